"""Linears and embeddings over rounded weights in plain ONNX: every scheme, wherever opset 24 runs."""

from __future__ import annotations

import torch
from onnx import TensorProto

from ....kernels.ops.quantized import FLOAT8, NF4
from .graph import Value
from .lower import Lowering, WeightValue
from .rounded_inputs import rounded_input
from .rounded_matrix import RoundedMatrix


def standard_linear(
    g: Lowering, x: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, bias: Value | None,
    scheme: str, group_size: int, activation: str, x_scale: Value | None, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Dequantize, then multiply; the input may be rounded before."""
    matrix = RoundedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    columns = g.op("Transpose", _dequantized(g, matrix), perm=[1, 0])
    if activation == "none":
        return with_bias(g, g.op("MatMul", x, columns), bias)
    codes, scale = rounded_input(g, x, activation, x_scale)
    return with_bias(g, g.op("Mul", g.op("MatMul", codes, columns), scale), bias)


def standard_embedding(
    g: Lowering, ids: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, scheme: str,
    group_size: int, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Rows of codes, expanded behind the lookup."""
    table = RoundedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    rank = len(ids.shape)
    levels = _levels(g, table, g.op("Gather", _bytes(g, table), ids, axis=0), rank)
    points = None if zeros is None else g.op("Gather", zeros, ids, axis=0)
    steps = g.op("Gather", table.spacing(g, group_size), ids, axis=0)
    return _scaled(g, table, levels, points, steps, rank)


def with_bias(g: Lowering, y: str, bias: Value | None) -> str:
    """A linear's result and its bias."""
    return y if bias is None else g.op("Add", y, bias)


def _dequantized(g: Lowering, matrix: RoundedMatrix) -> str:
    """The weight [O, I] in float."""
    # Codes of nf4 are no numbers. A weight of 4 bits is no array of numpy, by which a graph that derives is handed it.
    if matrix.scheme == "nf4" or (matrix.scheme == "int4" and g.derives):
        levels = _levels(g, matrix, _bytes(g, matrix), 1)
        return _scaled(g, matrix, levels, matrix.zeros, matrix.spacing(g, matrix.group_size), 1)
    codes = matrix.elements(g)
    if matrix.has_one_step:
        zeros = matrix.element_zeros(g, (matrix.rows,))
        return g.op("DequantizeLinear", codes, matrix.row_scales(g), zeros, axis=0)
    group = matrix.group_size
    zeros = matrix.element_zeros(g, (matrix.rows, matrix.columns // group))
    return g.op("DequantizeLinear", codes, matrix.spacing(g, group), zeros, axis=1, block_size=group)


def _bytes(g: Lowering, matrix: RoundedMatrix) -> Value:
    """The codes as they are stored; of floats their bits."""
    if matrix.scheme in FLOAT8:
        return g.weight(f"{matrix.codes}.bits", matrix.codes.weight, dtype=TensorProto.UINT8)
    return matrix.codes


def _levels(g: Lowering, matrix: RoundedMatrix, codes: str, rank: int) -> str:
    """What codes [..., bytes] of so many leading dims stand for, zero points and scales left out: [..., I]."""
    if matrix.is_packed:
        low = g.op("BitwiseAnd", codes, g.constant(15, torch.uint8))
        high = g.op("BitShift", codes, g.constant(4, torch.uint8), direction="RIGHT")
        pairs = g.op("Concat", *(g.op("Unsqueeze", half, g.constant([-1])) for half in (low, high)), axis=-1)
        codes = g.op("Reshape", pairs, g.constant([0] * rank + [matrix.columns]))
    if matrix.scheme in ("int8", "int4"):
        return g.op("Cast", codes, to=TensorProto.FLOAT)
    if matrix.scheme == "nf4":
        values = torch.tensor(NF4)
    else:
        values = torch.arange(256, dtype=torch.uint8).view(FLOAT8[matrix.scheme]).float()
    return g.op("Gather", g.constant(values), g.op("Cast", codes, to=TensorProto.INT32), axis=0)


def _scaled(g: Lowering, matrix: RoundedMatrix, levels: str, zeros: str | None, steps: str, rank: int) -> str:
    """Levels [..., I] around their zero points, times the spacing of their group, both [..., I/group]."""
    groups = matrix.columns // matrix.group_size
    if groups > 1:
        levels = g.op("Reshape", levels, g.constant([0] * rank + [groups, matrix.group_size]))
        steps = g.op("Unsqueeze", steps, g.constant([-1]))
    if zeros is not None:
        points = g.op("Cast", zeros, to=TensorProto.FLOAT)
        levels = g.op("Sub", levels, g.op("Unsqueeze", points, g.constant([-1])) if groups > 1 else points)
    elif matrix.scheme == "int4":
        levels = g.op("Sub", levels, g.constant(8.0))
    scaled = g.op("Mul", levels, steps)
    return g.op("Reshape", scaled, g.constant([0] * rank + [matrix.columns])) if groups > 1 else scaled
