"""Quantized linear layers and embeddings in plain ONNX, for every scheme."""

from __future__ import annotations

import torch
from onnx import TensorProto

from ....kernels.ops.quantized import FLOAT8, NF4
from .graph import Value
from .lower import Lowering, WeightValue
from .quantized_inputs import quantized_input
from .quantized_matrix import QuantizedMatrix


def standard_linear(
    g: Lowering, x: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, bias: Value | None,
    scheme: str, group_size: int, activation: str, x_scale: Value | None, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Dequantize the weight, quantize the input if requested, and multiply."""
    matrix = QuantizedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    transposed = g.op("Transpose", _dequantized(g, matrix), perm=[1, 0])
    if activation == "none":
        return with_bias(g, g.op("MatMul", x, transposed), bias)
    codes, scale = quantized_input(g, x, activation, x_scale)
    return with_bias(g, g.op("Mul", g.op("MatMul", codes, transposed), scale), bias)


def standard_embedding(
    g: Lowering, ids: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, scheme: str,
    group_size: int, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Look up the codes of the tokens, and dequantize them."""
    table = QuantizedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    rank = len(ids.shape)
    levels = _levels(g, table, g.op("Gather", _bytes(g, table), ids, axis=0), rank)
    zero_points = None if zeros is None else g.op("Gather", zeros, ids, axis=0)
    group_scales = g.op("Gather", table.spacing(g, group_size), ids, axis=0)
    return _scaled(g, table, levels, zero_points, group_scales, rank)


def with_bias(g: Lowering, y: str, bias: Value | None) -> str:
    """Add the bias of a linear layer, if it has one."""
    return y if bias is None else g.op("Add", y, bias)


def _dequantized(g: Lowering, matrix: QuantizedMatrix) -> str:
    """Return the dequantized weight [O, I]."""
    # nf4 codes are indices and not numbers. The runtime passes the stored weights of a graph with derived matrices as
    # numpy arrays, which have no 4-bit type.
    if matrix.scheme == "nf4" or (matrix.scheme == "int4" and g.derives):
        levels = _levels(g, matrix, _bytes(g, matrix), 1)
        return _scaled(g, matrix, levels, matrix.zeros, matrix.spacing(g, matrix.group_size), 1)
    codes = matrix.elements(g)
    if matrix.is_per_channel:
        zeros = matrix.element_zeros(g, (matrix.output_channels,))
        return g.op("DequantizeLinear", codes, matrix.output_scales(g), zeros, axis=0)
    group = matrix.group_size
    zeros = matrix.element_zeros(g, (matrix.output_channels, matrix.input_channels // group))
    return g.op("DequantizeLinear", codes, matrix.spacing(g, group), zeros, axis=1, block_size=group)


def _bytes(g: Lowering, matrix: QuantizedMatrix) -> Value:
    """Return the codes as stored; float8 codes as bytes."""
    if matrix.scheme in FLOAT8:
        return g.weight(f"{matrix.codes}.bits", matrix.codes.weight, dtype=TensorProto.UINT8)
    return matrix.codes


def _levels(g: Lowering, matrix: QuantizedMatrix, codes: str, rank: int) -> str:
    """Return the values [..., I] of codes [..., bytes] before zero points and scales.

    Args:
        rank: the number of leading dimensions.
    """
    if matrix.is_packed:
        low = g.op("BitwiseAnd", codes, g.constant(15, torch.uint8))
        high = g.op("BitShift", codes, g.constant(4, torch.uint8), direction="RIGHT")
        pairs = g.op("Concat", *(g.op("Unsqueeze", half, g.constant([-1])) for half in (low, high)), axis=-1)
        codes = g.op("Reshape", pairs, g.constant([0] * rank + [matrix.input_channels]))
    if matrix.scheme in ("int8", "int4"):
        return g.op("Cast", codes, to=TensorProto.FLOAT)
    if matrix.scheme == "nf4":
        values = torch.tensor(NF4)
    else:
        values = torch.arange(256, dtype=torch.uint8).view(FLOAT8[matrix.scheme]).float()
    return g.op("Gather", g.constant(values), g.op("Cast", codes, to=TensorProto.INT32), axis=0)


def _scaled(g: Lowering, matrix: QuantizedMatrix, levels: str, zeros: str | None, scales: str, rank: int) -> str:
    """Subtract zero points from levels [..., I] and multiply by scales.

    Zero points and scales are [..., I/group_size].
    """
    groups = matrix.input_channels // matrix.group_size
    if groups > 1:
        levels = g.op("Reshape", levels, g.constant([0] * rank + [groups, matrix.group_size]))
        scales = g.op("Unsqueeze", scales, g.constant([-1]))
    if zeros is not None:
        zero_points = g.op("Cast", zeros, to=TensorProto.FLOAT)
        levels = g.op("Sub", levels, g.op("Unsqueeze", zero_points, g.constant([-1])) if groups > 1 else zero_points)
    elif matrix.scheme == "int4":
        levels = g.op("Sub", levels, g.constant(8.0))
    scaled = g.op("Mul", levels, scales)
    return g.op("Reshape", scaled, g.constant([0] * rank + [matrix.input_channels])) if groups > 1 else scaled
