"""The choice of rows moved up: what nobody reads is dropped before the last layer computes with it."""

from __future__ import annotations

import operator

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...ir.program import Program
from ...ir.stages import Stage
from ...kernels.ops import take_rows
from ..base import Fuel, Pass, PassResult
from ..queries import is_op
from .select_logits import SelectLogits


class HoistLogitSelection(Pass):
    """Take the chosen rows behind the last attention instead of in front of the head.

    Tokens meet in attention only, so what comes behind the last one is computed for the chosen rows alone: a layer's
    output projection and its MLP.

    Example:  h = x + mlp(x);  y = linear(take_rows(h, rows), head)
    Becomes:  t = take_rows(x, rows);  y = linear(t + mlp(t), head)

    Left alone: 1. a value that something else reads as well, such as the next call's keys; 2. an op that takes or gives
    another shape than [B, S, ...], for its arguments may be sizes.
    """

    needs = Stage.CACHED
    after = (SelectLogits,)

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        chosen = next((node for node in program.nodes if is_op(node, take_rows)), None)
        if chosen is None or fuel.empty:
            return PassResult(0)
        behind = self._behind(program, chosen)
        if not behind:
            return PassResult(0)
        rows, length = chosen.args[1], _length(chosen.args[0])
        taken: dict[fx.Node, fx.Node] = {}
        for node in behind:
            for source in node.all_input_nodes:
                if source in behind or _length(source) != length:
                    continue
                if source not in taken:
                    with program.graph.inserting_before(node):
                        taken[source] = program.call(take_rows, source, rows, like=node)
                node.replace_input_with(source, taken[source])
            node.meta["val"] = program.infer(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]
        program.replace(chosen, chosen.args[0])  # type: ignore[arg-type]
        fuel.burn()
        return PassResult(1)

    @staticmethod
    def _behind(program: Program, chosen: fx.Node) -> list[fx.Node]:
        """What is read for the chosen rows alone and treats each row by itself, in order."""
        found: dict[fx.Node, None] = {}
        length = _length(chosen.args[0])
        for node in reversed(program.nodes[: program.nodes.index(chosen)]):
            if node.users and all(user in found or user is chosen for user in node.users) and _by_rows(node, length):
                found[node] = None
        # One value of a call that gives several is taken only together with the call.
        whole = [node for node in found if node.target is not operator.getitem or node.args[0] in found]
        return whole[::-1]


def _by_rows(node: fx.Node, length: str | None) -> bool:
    """Whether a call gives [B, S, ...] and reads nothing with S in another place, nor a size."""
    if node.op != "call_function":
        return False
    values = [node.meta["val"], *(source.meta["val"] for source in node.all_input_nodes)]
    tensors = pytree.tree_leaves(values)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    dims = [[str(dim) for dim in tensor.shape] for tensor in tensors]
    gives_rows = all(dims[place][1:2] == [length] for place in range(len(pytree.tree_leaves(node.meta["val"]))))
    return gives_rows and all(length not in each[:1] + each[2:] for each in dims)


def _length(node: object) -> str | None:
    """The second dim of a value."""
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    return str(value.shape[1]) if isinstance(value, Tensor) and value.dim() > 1 else None
