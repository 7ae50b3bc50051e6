"""Move the selection of tokens up, so that the last layer computes less."""

from __future__ import annotations

import operator

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...ir.nodes import set_value, value_of
from ...ir.program import Program
from ...ir.stages import Stage
from ...kernels.ops import take_rows
from ..base import Fuel, Pass, PassResult
from ..queries import is_op
from .select_logits import SelectLogits


class HoistLogitSelection(Pass):
    """Select tokens after the last attention instead of in front of the LM head.

    Tokens interact only in attention, so all ops after the last one need only the selected tokens: the output
    projection and the MLP of the last layer.

    Example:  h = x + mlp(x);  y = linear(take_rows(h, rows), head)
    Becomes:  t = take_rows(x, rows);  y = linear(t + mlp(t), head)

    Left alone: 1. a value that other ops use too, such as the next call's keys; 2. an op with an input or output of
    another shape than [B, S, ...], because its arguments may be sizes.
    """

    needs = Stage.CACHED
    after = (SelectLogits,)

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        selection = next((node for node in program.nodes if is_op(node, take_rows)), None)
        if selection is None or fuel.empty:
            return PassResult(0)
        movable = self._movable(program, selection)
        if not movable:
            return PassResult(0)
        wanted, length = selection.args[1], _length(selection.args[0])
        selected: dict[fx.Node, fx.Node] = {}
        for node in movable:
            for source in node.all_input_nodes:
                if source in movable or _length(source) != length:
                    continue
                if source not in selected:
                    with program.graph.inserting_before(node):
                        selected[source] = program.call(take_rows, source, wanted, like=node)
                node.replace_input_with(source, selected[source])
            set_value(node, program.infer(node.target, node.args, dict(node.kwargs)))  # type: ignore[arg-type]
        program.replace(selection, selection.args[0])  # type: ignore[arg-type]
        fuel.burn()
        return PassResult(1)

    @staticmethod
    def _movable(program: Program, selection: fx.Node) -> list[fx.Node]:
        """Return the ops that can run on selected tokens only, in order.

        No other op uses their results, and they process each token on its own.
        """
        found: dict[fx.Node, None] = {}
        length = _length(selection.args[0])
        for node in reversed(program.nodes[: program.nodes.index(selection)]):
            is_used_elsewhere = any(user not in found and user is not selection for user in node.users)
            if node.users and not is_used_elsewhere and _is_tokenwise(node, length):
                found[node] = None
        # One value of a call with several results is moved only together with the call.
        whole = [node for node in found if node.target is not operator.getitem or node.args[0] in found]
        return whole[::-1]


def _is_tokenwise(node: fx.Node, length: str | None) -> bool:
    """True if inputs are tensors, outputs are [B, S, ...], and no other dim is S."""
    if node.op != "call_function":
        return False
    values = [value_of(node), *(value_of(source) for source in node.all_input_nodes)]
    tensors = pytree.tree_leaves(values)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    dims = [[str(dim) for dim in tensor.shape] for tensor in tensors]
    is_output_per_token = all(dims[i][1:2] == [length] for i in range(len(pytree.tree_leaves(value_of(node)))))
    return is_output_per_token and all(length not in each[:1] + each[2:] for each in dims)


def _length(node: object) -> str | None:
    """Return the size of a value's second dim, or None."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return str(value.shape[1]) if isinstance(value, Tensor) and value.dim() > 1 else None
