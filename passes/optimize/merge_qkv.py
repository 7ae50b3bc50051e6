"""Merge the query, key and value projections of an attention into one matmul."""

from __future__ import annotations

from torch import fx

from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...kernels.ops import attention, cached_attention
from ..base import Rewrite, miss
from ..queries import is_op
from .merge_projections import merge, projection_behind


class MergeQkv(Rewrite):
    """Merge the q, k and v projections, to read their input once, not three times.

    Example:  attention(rope(linear(x, wq)), rope(linear(x, wk)), linear(x, wv))
    Becomes:  q, k, v = split(linear(x, concat(wq, wk, wv)));  attention(rope(q), rope(k), v)

    Left alone: 1. q, k and v don't come from three projections (they may be merged already, or one is shared); 2. the
    projections have different inputs; 3. a weight is used elsewhere too; 4. only some have a bias; 5. a weight or bias
    is computed.
    """

    needs = Stage.CANONICAL

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not (is_op(node, attention) or is_op(node, cached_attention)):
            return None
        projections = [projection_behind(argument) for argument in node.args[:3]]
        found = [p for p in projections if p is not None]
        if len(set(found)) != 3:
            return miss("q, k and v don't come from three projections", node)
        return merge(program, found, "qkv_proj")
