"""Unmerge linears where one matmul for all parts costs more than a matmul for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...ir.weights import slice_dim0
from ...kernels.ops import linear, op_of, quant_linear
from ..base import Rewrite, miss
from ..queries import is_call, is_op

_SPLITS = ("split", "split_with_sizes", "chunk")
_PER_OUTPUT_CHANNEL = ("weight", "scales", "multiples", "zeros", "bias")


class UnmergeLinears(Rewrite):
    """Compute each part of a merged linear by a matmul of its own.

    Example:  gate, up = split(quant_linear(x, codes, scales), [I, I], -1)
    Becomes:  gate = quant_linear(x, codes[:I], scales[:I]);  up = quant_linear(x, codes[I:], scales[I:])

    The parts may also be slices. For one token the merged form is faster. For hundreds of tokens
    the split copies megabytes, and two large matmuls are as fast as one. The parts are slices of weights that are
    stored anyway, so no bytes are stored twice.

    Left alone: 1. parts along another dim; 2. parts of anything but the direct output of a linear that `chosen` names;
    3. the merged output has other users; 4. slices that overlap or have steps.

    Args:
        chosen: returns True for linears to unmerge. It is given the linear and the widths of its parts.
            By default, the quantized ones.
    """

    needs = Stage.CACHED

    def __init__(
        self, chosen: Callable[[fx.Node, Sequence[int]], bool] = lambda node, widths: is_op(node, quant_linear)
    ) -> None:
        self.chosen = chosen

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not (is_op(node, quant_linear) or is_op(node, linear)):
            return None
        splits = [user for user in node.users if is_call(user, *_SPLITS, "slice")]
        if not splits:
            return None
        if any(_dim(user) not in (-1, len(value_of(node).shape) - 1) for user in splits):
            return miss("it splits another dim than the output channels", splits[0])
        if len(splits) < len(node.users) or (len(splits) > 1 and not all(is_call(user, "slice") for user in splits)):
            return miss("the merged output has other users", splits[0])
        pieces = _slices(splits) if is_call(splits[0], "slice") else _items(splits[0])
        if pieces is None:
            return miss("the slices overlap or have steps", splits[0])
        if not self.chosen(node, [piece.end - piece.start for piece in pieces]):
            return None
        for piece in pieces:
            program.replace(piece.node, _linear_of(program, node, piece))
        if is_call(splits[0], *_SPLITS):
            program.graph.erase_node(splits[0])
        return True


@dataclass(frozen=True)
class _Piece:
    """A node that is the output channels from `start` to `end` of a linear."""

    node: fx.Node
    start: int
    end: int


def _dim(split: fx.Node) -> int:
    position = 1 if is_call(split, "slice") else 2
    return int(split.args[position]) if len(split.args) > position else 0  # type: ignore[arg-type]


def _items(split: fx.Node) -> list[_Piece]:
    sizes = [int(part.shape[-1]) for part in value_of(split)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    items = [(user, int(user.args[1])) for user in split.users]  # type: ignore[arg-type]
    return [_Piece(user, starts[index], starts[index] + sizes[index]) for user, index in items]


def _slices(slices: list[fx.Node]) -> list[_Piece] | None:
    width = int(value_of(slices[0].args[0]).shape[-1])  # type: ignore[arg-type]
    pieces = []
    for node in slices:
        given: list[Any] = list(node.args[2:])
        first, last, step = slice(*given, *[None] * (3 - len(given))).indices(width)
        if step != 1:
            return None
        pieces.append(_Piece(node, first, last))
    pieces.sort(key=lambda piece: piece.start)
    overlap = any(one.end > following.start for one, following in pairwise(pieces))
    return None if overlap else pieces


def _linear_of(program: Program, merged: fx.Node, piece: _Piece) -> fx.Node:
    op = op_of(merged.target)
    assert op is not None
    arguments = op.bind(merged.args, dict(merged.kwargs))
    for name in _PER_OUTPUT_CHANNEL:
        if isinstance(operand := arguments.get(name), fx.Node):
            part = slice_dim0(program.weights[str(operand.target)], piece.start, piece.end)
            arguments[name] = program.add_weight(f"{operand.target}.from_{piece.start}", part, like=piece.node)
    with program.graph.inserting_before(piece.node):
        return program.call(op, **arguments, like=piece.node)
