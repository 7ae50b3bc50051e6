"""Replace buffers that are filled piece by piece by a concatenation."""

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
    """Replace a new buffer that is filled completely by `cat`.

    Example:  b = new_empty(...);  b = slice_scatter(b, copy(b[..., :n], x), -1, 0, n)
              y = slice_scatter(b, copy(b[..., n:], z), -1, n, end)
    Becomes:  y = cat([x, z], -1)

    A functionalized `copy` into a slice is replaced by the copied value, expanded and cast as the copy does.

    Left alone: 1. pieces that leave a gap or overlap; 2. pieces along several dims, with steps, or along a dynamic dim;
    3. pieces written into a tensor that is no new buffer.
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
                return miss("the pieces are along several dims, have steps, or are along a dynamic dim", base)
            pieces.append((_bound(call["start"], 0, size), call["src"]))
            base = call["self"]
        if not is_call(base, *_BUFFERS):
            return miss("the pieces are written into a tensor that is no new buffer", node)
        pieces.sort(key=lambda piece: piece[0])
        end = 0
        for start, piece in pieces:
            if start != end:
                return miss("the pieces leave a gap or overlap", node)
            end += shape(piece)[dim]
        if end != size:
            return miss("the pieces leave a gap or overlap", node)
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
