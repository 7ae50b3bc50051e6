"""Quantized linear layers and embeddings in ONNX Runtime's contrib ops.

Standard ops are used where there is no suitable kernel.
"""

from __future__ import annotations

import torch

from ....ir.weights import cast, transpose
from ..onnx.graph import MICROSOFT, Value
from ..onnx.lower import Derived, Lowering, WeightValue
from ..onnx.quantized import standard_embedding, standard_linear, with_bias
from ..onnx.quantized_inputs import integer_input
from ..onnx.quantized_matrix import QuantizedMatrix
from .facts import FASTEST_GROUPS


def contrib_linear(
    g: Lowering, x: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, bias: Value | None,
    scheme: str, group_size: int, activation: str, x_scale: Value | None, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Multiply by the codes directly; with int8 inputs as a product of integers."""
    matrix = QuantizedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    is_half = x.dtype is not torch.float32
    if activation == "int8" and _is_integers(g, matrix) and not is_half:
        return with_bias(g, _integer_matmul(g, x, matrix, x_scale), bias)
    block = matrix.block(FASTEST_GROUPS)
    if activation == "none" and block and scheme in ("int8", "int4"):
        return _matmul_of_codes(g, x, matrix, block, bias)
    if activation == "none" and block and scheme == "nf4":
        return with_bias(g, _matmul_of_levels(g, x, matrix, block), bias and g.convert(bias, x.dtype))
    if is_half:
        # What dequantizes weights and quantizes inputs does so in float32.
        wide_bias, wide_scale = (value and g.convert(value, torch.float32) for value in (bias, x_scale))
        y = standard_linear(
            g, g.cast(x, torch.float32), weight, _in_float(scales), zeros, wide_bias, scheme, group_size, activation,
            wide_scale, multiples,
        )  # fmt: skip
        return g.cast(y, x.dtype)
    return standard_linear(g, x, weight, scales, zeros, bias, scheme, group_size, activation, x_scale, multiples)


def contrib_embedding(
    g: Lowering, ids: Value, weight: WeightValue, scales: WeightValue, zeros: WeightValue | None, scheme: str,
    group_size: int, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Look up and dequantize the codes of the tokens in one op."""
    table = QuantizedMatrix(weight, scales, zeros, multiples, scheme, group_size)
    block = table.block(FASTEST_GROUPS)
    if scheme not in ("int8", "int4") or block is None:
        y = standard_embedding(g, ids, weight, _in_float(scales), zeros, scheme, group_size, multiples)
        return y if scales.dtype is torch.float32 else g.cast(y, scales.dtype)
    return g.op(
        "GatherBlockQuantized", table.unsigned(g, weight.shape), ids, _spacing(g, table, block, scales.dtype),
        table.unsigned_zeros(g, block), domain=MICROSOFT,
        bits=4 if table.is_packed else 8, block_size=block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _in_float(scales: WeightValue) -> WeightValue:
    if scales.dtype is torch.float32:
        return scales
    return WeightValue.of(f"{scales}.float32", cast(scales.weight, torch.float32))


def _spacing(g: Lowering, matrix: QuantizedMatrix, block: int, dtype: torch.dtype) -> Value:
    """Return the scale of each block in the dtype of a kernel."""
    # In float32, repeated scales are computed when the graph is opened; a CPU has no kernels for that in others.
    return matrix.spacing(g, block) if dtype is torch.float32 else matrix.stored_spacing(g, block, dtype)


def _matmul_of_codes(g: Lowering, x: Value, matrix: QuantizedMatrix, block: int, bias: Value | None) -> str:
    bits = 4 if matrix.is_packed else 8
    codes = matrix.unsigned(g, (matrix.output_channels, matrix.input_channels // block, block * bits // 8))
    # accuracy_level 4: the kernel quantizes the input to int8 per block, which is required for the fast kernels on
    # CPUs. Those on GPUs have no levels.
    return g.op(
        "MatMulNBits", x, codes, _spacing(g, matrix, block, x.dtype), matrix.unsigned_zeros(g, block), None,
        bias and g.convert(bias, x.dtype),
        domain=MICROSOFT, K=matrix.input_channels, N=matrix.output_channels, bits=bits, block_size=block,
        accuracy_level=4 if x.dtype is torch.float32 else None,
    )  # fmt: skip


def _matmul_of_levels(g: Lowering, x: Value, matrix: QuantizedMatrix, block: int) -> str:
    blocks = matrix.output_channels * (matrix.input_channels // block)
    scales = g.op("Reshape", _spacing(g, matrix, block, x.dtype), g.constant([blocks]))
    return g.op(
        "MatMulBnb4", x, matrix.high_nibble_first(g), scales, domain=MICROSOFT,
        K=matrix.input_channels, N=matrix.output_channels, block_size=block, quant_type=1,
    )  # fmt: skip


def _is_integers(g: Lowering, matrix: QuantizedMatrix) -> bool:
    """True if the weight can be an int8 matrix times one scale per output channel.

    Such a matrix is stored, or derived by the runtime from 4-bit codes.
    """
    if matrix.scheme == "int8":
        return matrix.is_per_channel
    return matrix.scheme == "int4" and matrix.scales.shape[1] == 1 and g.derives


def _integer_matmul(g: Lowering, x: Value, matrix: QuantizedMatrix, x_scale: Value | None) -> str:
    """Multiply integers exactly, and then multiply by both scales."""
    codes, scale = integer_input(g, x, x_scale)
    y = g.op(
        "MatMulIntegerToFloat", codes, _transposed(g, matrix), g.constant(1.0) if x_scale is None else scale,
        matrix.output_scales(g), g.constant(128, torch.uint8),
        matrix.output_zeros(g) if matrix.scheme == "int8" else None,
        domain=MICROSOFT,
    )  # fmt: skip
    return g.op("Mul", y, scale) if x_scale is None else y


def _transposed(g: Lowering, matrix: QuantizedMatrix) -> Value:
    """Return the integers [I, O] of the weight.

    These are int8 codes, or int4 codes minus their zero points, times their multiples.
    """
    name = f"{matrix.codes}.columns"
    if not g.derives:
        return g.weight(name, transpose(matrix.codes.weight))
    codes, zeros, multiples = g.data.add(str(matrix.codes), matrix.unsigned_weight), None, None
    if matrix.is_packed and matrix.zeros is not None:
        zeros = g.data.add(str(matrix.zeros), matrix.unsigned_zeros_weight(matrix.group_size))
    if matrix.multiples is not None:
        multiples = g.data.add(str(matrix.multiples), matrix.multiples.weight)
    shape = matrix.output_channels, matrix.input_channels
    return g.derive(Derived(name, matrix.scheme, *shape, matrix.group_size, codes, zeros, multiples))
