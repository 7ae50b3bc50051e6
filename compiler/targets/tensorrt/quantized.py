"""Quantized linears and embeddings in the spellings whose codes TensorRT's matmuls read as stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx import TensorProto
from torch import fx

from ....ir.weights import Call, Weight, cast
from ....kernels.ops import quant_linear as quant_linear_op
from ....kernels.ops.quantized import FLOAT8, SMALLEST_ABSMAX
from ....passes.queries import is_op
from ..onnx.graph import Value
from ..onnx.lower import Lowering, WeightValue
from ..onnx.quantized import with_bias
from ..onnx.quantized_matrix import QuantizedMatrix

aten = torch.ops.aten

_ELEMENTS = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "fp8": TensorProto.FLOAT8E4M3FN}
_LARGEST = {"int8": 127.0, "fp8": float(torch.finfo(FLOAT8["fp8"]).max)}
# Powers of two, so that a number divided by its token's scale keeps all its digits.
_STEPS = {"int8": 2.0**-7, "fp8": 2.0**-9}


def reads_weights_apart(node: fx.Node, widths: Sequence[int]) -> bool:
    """Return True for linears that TensorRT joins itself where it pays, and for those that it would expand.

    It joins 16-bit weights and 8-bit inputs, and its profiles share those weights only if the network has them apart.
    It does not join weights that it dequantizes; but of three parts of one width in 8 bits, such as queries, keys and
    values, its kernel for prompts writes the whole weight out in 16 bits.

    Args:
        widths: output channels of the parts.
    """
    call = quant_linear_op.bind(node.args, dict(node.kwargs)) if is_op(node, quant_linear_op) else None
    if call is None or call["activation"] != "none" or call["scheme"] in FLOAT8:
        return True
    return call["scheme"] == "int8" and len(widths) > 2 and len(set(widths)) == 1


def quant_linear(
    g: Lowering, x: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, bias: Value | None,
    scheme: str, group_size: int, activation: str, x_scale: Value | None, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Dequantize the weight [O, I], and multiply by it transposed.

    With quantized inputs:  x -> Div s -> QuantizeLinear c -> DequantizeLinear c -> MatMul -> Mul s

    Here s is computed for each token so that x / s is at most 1, and c is a constant. A computed scale on
    QuantizeLinear itself would not become an 8-bit matmul. Products of the codes could exceed the range of fp16.
    """
    assert zeros is None, "the plan keeps no zero points: see facts"
    matrix = QuantizedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    transposed = g.op("Transpose", dequantized(g, matrix, x.dtype), perm=[1, 0])
    if activation == "none":
        return with_bias(g, g.op("MatMul", x, transposed), bias)
    if x_scale is not None:
        return with_bias(g, g.op("MatMul", _static(g, x, activation, x_scale), transposed), bias)
    rounded, scale = _by_token(g, x, activation)
    return with_bias(g, g.op("Mul", g.op("MatMul", rounded, transposed), scale), bias)


def quant_embedding(
    g: Lowering, ids: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, scheme: str,
    group_size: int, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Look up the dequantized embeddings; a matmul may read the same codes."""
    assert zeros is None, "the plan keeps no zero points: see facts"
    table = QuantizedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    return g.op("Gather", dequantized(g, table, scales.dtype), ids, axis=0)


def dequantized(g: Lowering, matrix: QuantizedMatrix, dtype: torch.dtype) -> str:
    """Return the weight [O, I] as DequantizeLinear of its codes."""
    codes = _codes(g, matrix)
    if matrix.is_packed:
        by_group = matrix.stored_spacing(g, matrix.group_size, dtype)
        return g.op("DequantizeLinear", codes, by_group, axis=1, block_size=matrix.group_size)
    scales = matrix.scales.weight
    if scales.shape[0] != matrix.output_channels:  # one scale for the whole weight
        scales = Call(aten.repeat_interleave.self_int, (scales, matrix.output_channels, 0))
    by_channel = g.weight(f"{matrix.scales}.by_channel", cast(scales, dtype), shape=(matrix.output_channels,))
    return g.op("DequantizeLinear", codes, by_channel, axis=0)


def _codes(g: Lowering, matrix: QuantizedMatrix) -> Value:
    codes: Weight = matrix.codes.weight
    if matrix.is_packed:
        # From 0..15 with zero point 8 to -8..7, in both halves of each byte.
        codes = Call(aten.bitwise_xor.Scalar, (codes, 0x88))
    shape = (matrix.output_channels, matrix.input_channels)
    return g.weight(f"{matrix.codes}.signed", codes, dtype=_ELEMENTS[matrix.scheme], shape=shape)


def _static(g: Lowering, x: Value, activation: str, x_scale: Value) -> str:
    key = ("static", str(x), activation, str(x_scale))
    if key not in g.memo:
        scale = g.cast(x_scale, x.dtype)
        codes = g.op("QuantizeLinear", x, scale, output_dtype=_ELEMENTS[activation])
        g.memo[key] = g.op("DequantizeLinear", codes, scale)
    return g.memo[key]


def _by_token(g: Lowering, x: Value, activation: str) -> tuple[str, str]:
    """Return an input divided by its token's scale and rounded, and the scales."""
    key = ("by token", str(x), activation)
    if key not in g.memo:
        largest, step = _LARGEST[activation], g.constant(_STEPS[activation], x.dtype)
        farthest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
        smallest = max(SMALLEST_ABSMAX, torch.finfo(x.dtype).smallest_normal)
        above_zero = g.op("Max", farthest, g.constant([smallest], x.dtype))
        scale = g.op("Mul", above_zero, g.constant([1 / (largest * _STEPS[activation])], x.dtype))
        codes = g.op("QuantizeLinear", g.op("Div", x, scale), step, output_dtype=_ELEMENTS[activation])
        g.memo[key] = g.op("DequantizeLinear", codes, step), scale
    return g.memo[key]
