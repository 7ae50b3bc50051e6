"""Tensors that are put together in a buffer, piece by piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.program import Miss, Program
from ..base import Rewrite, miss
from ..queries import arguments, dtype, is_call, same_shape, shape

aten = torch.ops.aten

_BUFFERS = ("new_empty", "empty", "empty_like", "new_zeros", "zeros", "zeros_like")


class MatchConcat(Rewrite):
    """Say `cat` where a buffer is filled until nothing of it is left.

    Example:  b = new_empty(...);  b = slice_scatter(b, copy(b[..., :n], x), -1, 0, n)
              y = slice_scatter(b, copy(b[..., n:], z), -1, n, end)
    Becomes:  y = cat([x, z], -1)

    A copy into a slice that was made functional is the copied value itself, spread and cast as the copy does.

    Left alone: 1. pieces that leave a part of the buffer as it was, or overlap; 2. pieces along several dims, with
    steps, or along a dim that is not static; 3. pieces put into something that is no fresh buffer.
    """

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_call(node, "copy"):
            return self._copy(program, node)
        if not is_call(node, "slice_scatter") or any(is_call(user, "slice_scatter") for user in node.users):
            return None
        call = arguments(node)
        rank = len(shape(node))
        dim, size = call["dim"] % rank, shape(node)[call["dim"]]
        pieces: list[tuple[int, Any]] = []
        base: Any = node
        while is_call(base, "slice_scatter"):
            call = arguments(base)
            if call["dim"] % rank != dim or call["step"] != 1 or not isinstance(size, int):
                return miss("pieces are put along several dims, with steps, or along a dim that is not static", base)
            pieces.append((_bound(call["start"], 0, size), call["src"]))
            base = call["self"]
        if not is_call(base, *_BUFFERS):
            return miss("what is filled is no fresh buffer", node)
        pieces.sort(key=lambda piece: piece[0])
        place = 0
        for start, piece in pieces:
            if start != place:
                return miss("the pieces leave a part of the buffer as it was, or overlap", node)
            place += shape(piece)[dim]
        if place != size:
            return miss("the pieces leave a part of the buffer as it was, or overlap", node)
        program.replace_with(node, aten.cat.default, [piece for _, piece in pieces], dim)
        return True

    @staticmethod
    def _copy(program: Program, node: fx.Node) -> bool:
        source = node.args[1]
        assert isinstance(source, fx.Node)
        with program.graph.inserting_before(node):
            if not same_shape(source, node):
                source = program.call(aten.expand_as.default, source, node.args[0], like=node)
            if dtype(source) != dtype(node):
                source = program.call(aten.to.dtype, source, dtype(node), like=node)
        program.replace(node, source)
        return True


def _bound(value: Any, default: int, size: int) -> int:
    if value is None:
        return default
    return value if value >= 0 else value + size
