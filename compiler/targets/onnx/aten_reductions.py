"""Ops over a dimension in ONNX: reductions, softmax, sorting and products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .aten_arithmetic import binary, operand, result
from .graph import Value
from .lower import Entry, Lowering, Table

Dims = int | Sequence[int] | None


def _axes(g: Lowering, dim: Dims) -> Value | None:
    """Return the axes as a constant, or None for all of them."""
    if dim is None or dim == [] or dim == ():
        return None
    return g.constant([dim] if isinstance(dim, int) else list(dim))


def reduction(kind: str) -> Entry:
    """Return an entry that reduces one, several or all dimensions.

    It computes in the dtype of the result: a sum of bools is an integer.
    """

    def entry(g: Lowering, input: Value, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> str:
        return g.op(kind, operand(g, input, result(g)), _axes(g, dim), keepdims=int(keepdim))

    return entry


def quantifier(kind: str) -> Entry:
    """Return an entry for `any`, the maximum of bools, or `all`, the minimum."""

    def entry(g: Lowering, input: Value, dim: Dims = None, keepdim: bool = False) -> Value:
        number = g.cast(g.cast(input, torch.bool), torch.int32)
        return g.cast(g.op(kind, number, _axes(g, dim), keepdims=int(keepdim)), torch.bool)

    return entry


def extremum(kind: str) -> Entry:
    """Return an entry for `max` or `min`.

    Of two tensors, of all values, or of a dimension; the latter also returns the index of the first extremum.
    """

    def entry(g: Lowering, input: Value, **arguments: Any) -> Any:
        if "other" in arguments:
            return binary(kind)(g, input, arguments["other"])
        if "dim" not in arguments:
            return g.op(f"Reduce{kind}", input, keepdims=0)
        dim, keepdim = arguments["dim"], arguments["keepdim"]
        values = g.op(f"Reduce{kind}", input, g.constant([dim]), keepdims=int(keepdim))
        return values, place(f"Arg{kind}")(g, input, dim, keepdim)

    return entry


def place(kind: str) -> Entry:
    """Return an entry for the index of the first extremum of a dimension or of all."""

    def entry(g: Lowering, input: Value, dim: int | None = None, keepdim: bool = False) -> str:
        value: Any = g.cast(input, torch.float64) if input.dtype == torch.int64 else input
        if dim is None:
            value = g.op("Reshape", value, g.constant([-1]))
        return g.op(kind, value, axis=dim or 0, keepdims=int(keepdim))

    return entry


def var(
    g: Lowering, input: Value, dim: Dims = None, unbiased: bool = True, correction: float | None = None,
    keepdim: bool = False,
) -> str:  # fmt: skip
    """Write the variance: squared differences from the mean over count - correction.

    The correction is 1 by default.
    """
    subtracted = (1 if unbiased else 0) if correction is None else correction
    axes = _axes(g, dim)
    centred = g.op("Sub", input, g.op("ReduceMean", input, axes, keepdims=1))
    squares = g.op("Mul", centred, centred)
    if subtracted == 0:
        return g.op("ReduceMean", squares, axes, keepdims=int(keepdim))
    dims = range(len(input.shape)) if axes is None else [dim] if isinstance(dim, int) else dim
    count: Any = g.constant(1, input.dtype)
    for d in dims or ():
        count = g.op("Mul", count, g.cast(g.op("Squeeze", g.length(input, d)), input.dtype))
    divisor = g.op("Max", g.op("Sub", count, g.constant(subtracted, input.dtype)), g.constant(0, input.dtype))
    return g.op("Div", g.op("ReduceSum", squares, axes, keepdims=int(keepdim)), divisor)


def std(g: Lowering, input: Value, **arguments: Any) -> str:
    return g.op("Sqrt", var(g, input, **arguments))


def vector_norm(
    g: Lowering, input: Value, ord: float = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None
) -> str:
    """Write the p-norm for any p, including 0 and both infinities."""
    x = operand(g, input, result(g))
    axes, keep = _axes(g, dim), int(keepdim)
    if ord in (1, 2):
        return g.op(f"ReduceL{int(ord)}", x, axes, keepdims=keep)
    size = g.op("Abs", x)
    if math.isinf(ord):
        return g.op("ReduceMax" if ord > 0 else "ReduceMin", size, axes, keepdims=keep)
    if ord == 0:
        return g.op("ReduceSum", g.op("Sign", size), axes, keepdims=keep)
    total = g.op("ReduceSum", g.op("Pow", size, g.constant(ord, result(g))), axes, keepdims=keep)
    return g.op("Pow", total, g.constant(1 / ord, result(g)))


def cumsum(g: Lowering, input: Value, dim: int, dtype: Any = None) -> str:
    return g.op("CumSum", operand(g, input, result(g)), g.constant(dim))


def softmax(kind: str) -> Entry:
    """Return an entry for `softmax` or its logarithm, in the dtype of the result."""

    def entry(g: Lowering, input: Value, dim: int, dtype: Any = None) -> str:
        return g.op(kind, operand(g, input, result(g)), axis=dim)

    return entry


# Order -------------------------------------------------------------------------------------------------------------


def topk(
    g: Lowering, input: Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[str, str]:
    return g.op("TopK", input, g.size(k), count=2, axis=dim, largest=int(largest), sorted=int(sorted))


def sort(
    g: Lowering, input: Value, dim: int = -1, descending: bool = False, stable: bool | None = None
) -> tuple[str, str]:
    """Sort by TopK, which is stable: of equal values, the earlier one comes first."""
    return topk(g, input, Value(g.length(input, dim)), dim, descending)


def argsort(g: Lowering, input: Value, dim: int = -1, descending: bool = False, stable: bool | None = None) -> str:
    return sort(g, input, dim, descending)[1]


def triangle(g: Lowering, input: Value, diagonal: Any = 0, *, upper: int) -> str:
    return g.op("Trilu", input, operand(g, diagonal, torch.int64), upper=upper)


# Contractions ------------------------------------------------------------------------------------------------------


def matmul(g: Lowering, input: Value, **other: Value) -> str:
    (right,) = other.values()
    return g.op("MatMul", input, right)


def addmm(g: Lowering, input: Value, beta: float = 1, alpha: float = 1, **factors: Value) -> str:
    """Write beta * input + alpha * (a @ b); `baddbmm` is the same for batches."""
    product: Any = g.op("MatMul", *factors.values())
    if alpha != 1:
        product = g.op("Mul", product, g.constant(alpha, result(g)))
    added = input if beta == 1 else g.op("Mul", input, g.constant(beta, result(g)))
    return g.op("Add", product, added)


def einsum(g: Lowering, equation: str, tensors: Sequence[Value], path: Any = None) -> str:
    return g.op("Einsum", *tensors, equation=equation.replace(" ", ""))


def conv1d(
    g: Lowering,
    input: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sequence[int] = (1,),
    padding: str | Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> str:
    """Write a convolution, padded by a number on both sides or to the same length."""
    if isinstance(padding, str):
        missing = dilation[0] * (weight.shape[2] - 1) if padding == "same" else 0
        pads = [missing // 2, missing - missing // 2]
    else:
        pads = [padding[0], padding[0]]
    # ONNX requires a batch dimension; in torch it is optional.
    value: Any = input if len(input.shape) == 3 else g.op("Unsqueeze", input, g.constant([0]))
    y = g.op("Conv", value, weight, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)
    return y if len(input.shape) == 3 else g.op("Squeeze", y, g.constant([0]))


_ENTRIES: dict[str, Entry] = {
    "addmm": addmm,
    "all": quantifier("ReduceMin"),
    "amax": reduction("ReduceMax"),
    "amin": reduction("ReduceMin"),
    "any": quantifier("ReduceMax"),
    "argmax": place("ArgMax"),
    "argmin": place("ArgMin"),
    "argsort": argsort,
    "baddbmm": addmm,
    "bmm": matmul,
    "conv1d": conv1d,
    "cumsum": cumsum,
    "einsum": einsum,
    "linalg_vector_norm": vector_norm,
    "log_softmax": softmax("LogSoftmax"),
    "logsumexp": reduction("ReduceLogSumExp"),
    "matmul": matmul,
    "max": extremum("Max"),
    "mean": reduction("ReduceMean"),
    "min": extremum("Min"),
    "mm": matmul,
    "prod": reduction("ReduceProd"),
    "softmax": softmax("Softmax"),
    "sort": sort,
    "std": std,
    "sum": reduction("ReduceSum"),
    "topk": topk,
    "tril": partial(triangle, upper=0),
    "triu": partial(triangle, upper=1),
    "var": var,
}

REDUCTIONS: Table = {f"aten.{name}": entry for name, entry in _ENTRIES.items()}
