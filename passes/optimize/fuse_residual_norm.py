"""Fuse a residual add and the norm of its sum into one op."""

from __future__ import annotations

from torch import fx

from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...kernels.ops import add_rms_norm, rms_norm
from ..base import Rewrite, miss
from ..queries import arguments, dtype, is_call, is_op, number, same_shape


class FuseResidualNorm(Rewrite):
    """Fold a residual add into the norm that reads it.

    Example:  s = x + r;  y = rms_norm(s, w, eps)
    Becomes:  y, s = add_rms_norm(x, r, w, eps)

    Left alone: 1. the add broadcasts or adds a number; 2. dtypes differ; 3. the add scales its second operand; 4. the
    norm's weight is computed: it may depend on the sum, but the fused op takes it before the sum exists.
    """

    needs = Stage.CANONICAL

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_op(node, rms_norm) or not is_call(node.args[0], "add"):
            return None
        total = node.args[0]
        x, residual = total.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(residual, fx.Node):
            return miss("the add adds a number", total)
        if not (same_shape(x, total) and same_shape(residual, total)):
            return miss("the add broadcasts", total)
        if not dtype(x) == dtype(residual) == dtype(total):
            return miss("the add's dtypes differ", total)
        if number(arguments(total).get("alpha", 1)) != 1:
            return miss("the add scales its second operand", total)
        norm = arguments(node)
        if norm["weight"] is not None and program.weight_of(norm["weight"]) is None:
            return miss("the norm's weight is computed", node)
        # In the place of the add, because other ops may use the sum before the norm does.
        with program.graph.inserting_before(total):
            fused = program.call(add_rms_norm, x, residual, norm["weight"], norm["eps"], like=node)
            normed, summed = program.item(fused, 0), program.item(fused, 1)
        program.replace(node, normed)
        program.replace(total, summed)
        return True
