"""Choose how inputs of integer linears are quantized, for many tokens and for few."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from ...ir.nodes import quantized_from, value_of
from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...kernels.ops import quant_linear
from ..base import Numerics, Rewrite, miss
from ..queries import is_op
from .quantization_plan import is_head
from .quantize import Quantize


class QuantizeActivations(Rewrite):
    """Quantize the inputs of integer linears to int8, with one scale per token.

    Example:  y = quant_linear(x, codes, scales, scheme="int4", activation="none")
    Becomes:  y = quant_linear(x, codes, scales, scheme="int4", activation="int8")

    Integer kernels are the fastest for many tokens.

    Left alone: 1. the LM head, which runs on one token per sequence; 2. weights with a scale per group, which are no
    integer matrix times one scale per output channel; 3. linears in `exact`; 4. inputs that are quantized already, and
    other schemes than int8 and int4.

    Args:
        exact: weights whose inputs are not quantized, by their names before quantization.
    """

    needs = Stage.CACHED
    numerics = Numerics.QUANTIZES_INPUTS
    after = (Quantize,)

    def __init__(self, exact: Collection[str] = ()) -> None:
        self.exact = exact

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_op(node, quant_linear) or is_head(program, node):
            return None
        call = quant_linear.bind(node.args, dict(node.kwargs))
        if call["activation"] != "none" or call["scheme"] not in ("int8", "int4"):
            return None
        if value_of(call["scales"]).shape[1] != 1:
            return miss("it has a scale per group, not one per output channel", node)
        if quantized_from(call["weight"]) in self.exact:
            return miss("its inputs are to stay exact", node)
        program.replace_with(node, quant_linear, *(call | {"activation": "int8"}).values())
        return True


class QuantizeInKernels(Rewrite):
    """Leave the quantization of inputs to the kernels that dequantize weights.

    Example:  y = quant_linear(x, codes, scales, scheme="int8", activation="int8")
    Becomes:  y = quant_linear(x, codes, scales, scheme="int8", activation="none")

    A decode step reads each weight for one token, and these kernels read weights the fastest. They also quantize inputs
    more finely: with a scale per group instead of one per token.

    Left alone: 1. inputs with a scale from calibration, which determines the results; 2. 8-bit floats.
    """

    needs = Stage.CACHED
    numerics = Numerics.QUANTIZES_INPUTS
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
