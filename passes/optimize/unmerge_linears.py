"""Unmerge linears where one matmul for all parts costs more than a matmul for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from torch import fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...ir.weights import slice_dim0
from ...kernels.ops import linear, op_of, quant_linear
from ..base import Rewrite, miss
from ..queries import is_call, is_op

_PER_OUTPUT_CHANNEL = ("weight", "scales", "multiples", "zeros", "bias")


class UnmergeLinears(Rewrite):
    """Compute each part of a merged linear by a matmul of its own.

    Example:  gate, up = split(quant_linear(x, codes, scales), [I, I], -1)
    Becomes:  gate = quant_linear(x, codes[:I], scales[:I]);  up = quant_linear(x, codes[I:], scales[I:])

    For one token the merged form is faster. For hundreds of tokens the split copies megabytes, and two large matmuls
    are as fast as one. The parts are slices of weights that are stored anyway, so no bytes are stored twice.

    Left alone: 1. a split along another dim; 2. a split of anything but the direct output of a linear that `chosen`
    names; 3. the merged output has other users.

    Args:
        chosen: returns True for linears to unmerge; by default the quantized ones.
    """

    needs = Stage.CACHED

    def __init__(self, chosen: Callable[[fx.Node], bool] = lambda node: is_op(node, quant_linear)) -> None:
        self.chosen = chosen

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_call(node, "split_with_sizes") or not _is_linear(node.args[0]) or not self.chosen(node.args[0]):
            return None
        merged, sizes, dim = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else 0
        if dim not in (-1, len(value_of(merged).shape) - 1):
            return miss("it splits another dim than the output channels", node)
        if len(merged.users) > 1:
            return miss("the merged output has other users", node)
        parts = list(_parts(program, merged, sizes, node))
        for user in list(node.users):
            program.replace(user, parts[user.args[1]])  # type: ignore[index]
        return True


def _is_linear(node: Any) -> TypeGuard[fx.Node]:
    return is_op(node, quant_linear) or is_op(node, linear)


def _parts(program: Program, merged: fx.Node, sizes: Any, node: fx.Node) -> Iterator[fx.Node]:
    op = op_of(merged.target)
    assert op is not None
    call = op.bind(merged.args, dict(merged.kwargs))
    start = 0
    for size in sizes:
        arguments = dict(call)
        for name in _PER_OUTPUT_CHANNEL:
            if isinstance(operand := call.get(name), fx.Node):
                part = slice_dim0(program.weights[str(operand.target)], start, start + size)
                arguments[name] = program.add_weight(f"{operand.target}.from_{start}", part, like=node)
        with program.graph.inserting_before(node):
            yield program.call(op, **arguments, like=node)
        start += size
