"""Linears and embeddings over rounded weights: in plain ONNX, and in ONNX Runtime's kernels.

The kernels want their bytes in layouts of their own. A layout is an expression over the weight's codes, so codes
that several graphs or ops read are written once wherever their bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto

from ...ir.weights import Call, Weight, rows, rows_of, transpose
from .graph import MICROSOFT, Value
from .lower import Derived, Lowering, WeightValue

aten = torch.ops.aten

# Blocks that MatMulNBits takes, the fastest first.
_BLOCKS = (128, 64, 32, 16)


def dequantized(
    g: Lowering, weight: WeightValue, scales: WeightValue, scheme: str, group_size: int, multiples: WeightValue | None
) -> str:
    """The weight [O, I] in float, by the standard's blocked DequantizeLinear."""
    rows, columns = weight.shape[0], weight.shape[1] * (2 if scheme == "int4" else 1)
    if scheme == "int8":
        return g.op("DequantizeLinear", weight, g.weight(f"{scales}.flat", _flat(scales.weight)), axis=0)
    codes = g.weight(f"{weight}.uint4", weight.weight, dtype=TensorProto.UINT4, shape=(rows, columns))
    steps = g.weight(f"{scales}.by_group", _by_group(scales.weight, multiples))
    groups = columns // group_size
    eights = Call(aten.full.default, (((rows * groups + 1) // 2,), 0x88), {"dtype": torch.uint8})  # two in a byte
    zeros = g.weight(f"{weight}.eights", eights, dtype=TensorProto.UINT4, shape=(rows, groups))
    return g.op("DequantizeLinear", codes, steps, zeros, axis=1, block_size=group_size)


def standard_linear(
    g: Lowering, x: Value, weight: WeightValue, scales: WeightValue, zeros: Any, bias: Value | None, scheme: str,
    group_size: int, activation: str, x_scale: Any, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Dequantize, then multiply; the input may be rounded to its row's int8 grid before."""
    _refuse_zeros(zeros, x_scale)
    matrix = g.op("Transpose", dequantized(g, weight, scales, scheme, group_size, multiples), perm=[1, 0])
    if activation == "none":
        return _with_bias(g, g.op("MatMul", x, matrix), bias)
    codes, scale = _rounded_rows(g, x)
    centred = g.op("Sub", g.cast(codes, x.dtype), g.constant(128.0, x.dtype))
    return _with_bias(g, g.op("Mul", g.op("MatMul", centred, matrix), scale), bias)


def standard_embedding(
    g: Lowering, ids: Value, weight: WeightValue, scales: WeightValue, zeros: Any, scheme: str, group_size: int
) -> str:
    """Rows of codes times the scales of the rows."""
    _refuse_zeros(zeros)
    rows = g.cast(g.op("Gather", weight, ids, axis=0), scales.dtype)
    return g.op("Mul", rows, g.op("Gather", scales, ids, axis=0))


def contrib_linear(
    g: Lowering, x: Value, weight: WeightValue, scales: WeightValue, zeros: Any, bias: Value | None, scheme: str,
    group_size: int, activation: str, x_scale: Any, multiples: WeightValue | None,
) -> str:  # fmt: skip
    """One row or few: codes are expanded as they are read. Rounded inputs: integers on both sides."""
    _refuse_zeros(zeros, x_scale)
    if activation == "int8":
        return _with_bias(g, _integer_matmul(g, x, weight, scales, scheme, group_size, multiples), bias)
    rows, columns = weight.shape[0], x.shape[-1]
    block = group_size if scheme == "int4" else next(b for b in _BLOCKS if columns % b == 0)
    codes, steps = _blocks(g, weight, scales, scheme, block, columns, multiples)
    bits = 4 if scheme == "int4" else 8
    # accuracy_level 4: the input is rounded to int8 block by block, which the fast kernels need.
    return g.op(
        "MatMulNBits", x, codes, steps, None, None, bias, domain=MICROSOFT,
        K=int(columns), N=int(rows), bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip


def contrib_embedding(
    g: Lowering, ids: Value, weight: WeightValue, scales: WeightValue, zeros: Any, scheme: str, group_size: int
) -> str:
    """Rows of codes, expanded as they are read."""
    _refuse_zeros(zeros)
    columns = weight.shape[1]
    block = next(b for b in _BLOCKS if columns % b == 0)
    codes, steps = _blocks(g, weight, scales, scheme, block, columns, None, flat=True)
    return g.op(
        "GatherBlockQuantized", codes, ids, steps, domain=MICROSOFT,
        bits=8, block_size=block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _blocks(
    g: Lowering, weight: WeightValue, scales: WeightValue, scheme: str, block: int, columns: int,
    multiples: WeightValue | None, flat: bool = False,
) -> tuple[Value, Value]:  # fmt: skip
    """Codes as unsigned bytes [O, I/block, bytes of a block] and scales [O, I/block]."""
    rows, blocks = weight.shape[0], columns // block
    # For the graph of many tokens, written while the rounding is at hand.
    g.data.add(f"{scales}.flat", _flat(scales.weight))
    if scheme == "int4":
        codes = g.weight(f"{weight}.blocks", weight.weight, shape=(rows, blocks, block // 2))
        return codes, g.weight(f"{scales}.by_group", _by_group(scales.weight, multiples))
    shape = (rows, columns) if flat else (rows, blocks, block)
    codes = g.weight(f"{weight}.{'rows' if flat else 'blocks'}", _unsigned(weight.weight), shape=shape)
    repeated = Call(aten.repeat.default, (scales.weight, [1, blocks]))
    return codes, g.weight(f"{scales}.by_block", repeated)


def _integer_matmul(
    g: Lowering, x: Value, weight: WeightValue, scales: WeightValue, scheme: str, group_size: int,
    multiples: WeightValue | None,
) -> str:  # fmt: skip
    """Integers on both sides, summed exactly, then times both scales."""
    codes, scale = _rounded_rows(g, x)
    outputs, columns = int(weight.shape[0]), int(x.shape[-1])
    name = f"{weight}.columns"
    if g.derives:
        stored = weight.weight if scheme == "int4" else _unsigned(weight.weight)
        steps = None if multiples is None else g.data.add(str(multiples), _by_group(scales.weight, multiples))
        places = g.data.add(str(weight), stored), g.data.add(str(scales), _flat(scales.weight)), steps
        matrix = g.derive(Derived(name, scheme, outputs, columns, group_size, *places))
    else:
        assert scheme == "int8", "packed codes have no transpose"
        matrix = g.weight(name, transpose(weight.weight))
    y = g.op(
        "MatMulIntegerToFloat", codes, matrix, g.constant(1.0, torch.float32),
        g.weight(f"{scales}.flat", _flat(scales.weight)), g.constant(128, torch.uint8), domain=MICROSOFT,
    )  # fmt: skip
    return g.op("Mul", y, scale)


def _rounded_rows(g: Lowering, x: Value) -> tuple[str, str]:
    """An input on the int8 grid of its rows: codes as bytes around 128, and the scale of each row."""
    key = ("rounded", str(x))
    if key not in g.memo:
        largest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
        scale = g.op("Mul", g.op("Max", largest, g.constant(2.0**-100, x.dtype)), g.constant(1 / 127, x.dtype))
        codes = g.op("QuantizeLinear", g.op("Div", x, scale), g.constant(1.0, x.dtype), g.constant(128, torch.uint8))
        g.memo[key] = codes, scale
    return g.memo[key]


def _unsigned(codes: Weight) -> Weight:
    """int8 codes as bytes around 128."""
    return _by_rows(lambda w: Call(aten.bitwise_xor.Scalar, (Call(aten.view.dtype, (w, torch.uint8)), 128)), codes)


def _by_group(scales: Weight, multiples: WeightValue | None) -> Weight:
    """The scale of each group, [O, I/group_size]."""
    if multiples is None:
        return scales
    return _by_rows(lambda row, times: Call(aten.mul.Tensor, (row, times)), scales, multiples.weight)


def _flat(scales: Weight) -> Weight:
    return _by_rows(lambda w: Call(aten.view.default, (w, [-1])), scales)


def _by_rows(make: Callable[..., Weight], *weights: Weight) -> Weight:
    """What `make` makes of weights row by row; of some rows it is rows of what it makes of all, which is stored."""
    parts = [rows_of(weight) for weight in weights]
    if any(part is None for part in parts):
        return make(*weights)
    first = parts[0][1]  # type: ignore[index]
    return rows(make(*(part[0] for part in parts if part)), first, first + weights[0].shape[0])


def _with_bias(g: Lowering, y: str, bias: Value | None) -> str:
    return y if bias is None else g.op("Add", y, bias)


def _refuse_zeros(*given: Any) -> None:
    assert all(x is None for x in given), "no pass makes zero points or static input scales yet"
