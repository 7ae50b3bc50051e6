"""Where the inputs of linears over integer weights are rounded: by row for many rows, in the kernel for few."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...kernels.ops import quant_linear
from ..base import Rewrite, miss
from ..queries import is_op
from .quantize import ROUNDED_FROM, Quantize
from .rounding_plan import is_head


class RoundActivations(Rewrite):
    """Round the inputs of linears over integer weights too, for integer kernels are the fastest for many rows.

    Example:  y = quant_linear(x, codes, scales, scheme="int4", activation="none")
    Becomes:  y = quant_linear(x, codes, scales, scheme="int4", activation="int8")

    Left alone: 1. the head, which sees one row; 2. matrices with scales of their own for each group, which are no
    matrix of integers times one scale a row; 3. those whose inputs are to stay exact.

    Args:
        exact: weights, by the names that they had before they were rounded.
    """

    needs = Stage.CACHED
    after = (Quantize,)

    def __init__(self, exact: Collection[str] = ()) -> None:
        self.exact = exact

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_op(node, quant_linear) or is_head(program, node):
            return None
        call = quant_linear.bind(node.args, dict(node.kwargs))
        if call["activation"] != "none" or call["scheme"] not in ("int8", "int4"):
            return None
        if call["scales"].meta["val"].shape[1] != 1:
            return miss("its groups have scales of their own", node)
        if call["weight"].meta.get(ROUNDED_FROM) in self.exact:
            return miss("its inputs are worth more than speed", node)
        program.replace_with(node, quant_linear, *(call | {"activation": "int8"}).values())
        return True


class RoundInKernels(Rewrite):
    """Leave the rounding of inputs to the kernels that expand codes, which round a few rows on their way, by group.

    Example:  y = quant_linear(x, codes, scales, scheme="int8", activation="int8")
    Becomes:  y = quant_linear(x, codes, scales, scheme="int8", activation="none")

    A step reads every weight for one row, and these kernels read them fastest. Their groups are finer than a row.

    Left alone: 1. a scale from calibration, which belongs to the numbers of the model; 2. floats of 8 bits.
    """

    needs = Stage.CACHED
    after = (Quantize,)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_op(node, quant_linear):
            return None
        call = quant_linear.bind(node.args, dict(node.kwargs))
        if call["activation"] != "int8":
            return None
        if call["x_scale"] is not None:
            return miss("its inputs have a scale from calibration", node)
        program.replace_with(node, quant_linear, *(call | {"activation": "none"}).values())
        return True
