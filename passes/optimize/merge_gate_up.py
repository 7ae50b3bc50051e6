"""Merge the gate and up projections of a gated unit into one matmul."""

from __future__ import annotations

from torch import fx

from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...kernels.ops import gated_act
from ..base import Rewrite, miss
from ..queries import is_op
from .merge_projections import merge, projection_behind


class MergeGateUp(Rewrite):
    """Merge the gate and up projections, to read their input once instead of twice.

    Example:  gated_act(linear(x, wg), linear(x, wu))
    Becomes:  gate, up = split(linear(x, concat(wg, wu)));  gated_act(gate, up)

    Left alone: 1. gate and up don't come from two projections (they may be merged already); 2. the projections have
    different inputs; 3. a weight is used elsewhere too; 4. only one has a bias; 5. a weight or bias is computed.
    """

    needs = Stage.CANONICAL

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_op(node, gated_act):
            return None
        gate, up = (projection_behind(argument) for argument in node.args[:2])
        if gate is None or up is None or gate is up:
            return miss("gate and up don't come from two projections", node)
        return merge(program, [gate, up], "gate_up_proj")
