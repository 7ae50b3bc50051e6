"""Ops that run over a dim, in ONNX: sums, sorting, normalisation and contractions."""

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
    """None, which ONNX reads as all, where torch does."""
    if dim is None or dim == [] or dim == ():
        return None
    return g.constant([dim] if isinstance(dim, int) else list(dim))


def reduction(kind: str) -> Entry:
    """Over one dim, several or all; in the dtype of the result, so that integers are not summed as bools."""

    def entry(g: Lowering, input: Value, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> str:
        return g.op(kind, operand(g, input, result(g)), _axes(g, dim), keepdims=int(keepdim))

    return entry


def quantifier(kind: str) -> Entry:
    """`any` is the largest truth value, `all` the smallest."""

    def entry(g: Lowering, input: Value, dim: Dims = None, keepdim: bool = False) -> Value:
        number = g.cast(g.cast(input, torch.bool), torch.int32)
        return g.cast(g.op(kind, number, _axes(g, dim), keepdims=int(keepdim)), torch.bool)

    return entry


def extremum(kind: str) -> Entry:
    """`max` and `min`: of two tensors, of all values, or of a dim with the place of the first."""

    def entry(g: Lowering, input: Value, **given: Any) -> Any:
        if "other" in given:
            return binary(kind)(g, input, given["other"])
        if "dim" not in given:
            return g.op(f"Reduce{kind}", input, keepdims=0)
        values = g.op(f"Reduce{kind}", input, g.constant([given["dim"]]), keepdims=int(given["keepdim"]))
        return values, place(f"Arg{kind}")(g, input, given["dim"], given["keepdim"])

    return entry


def place(kind: str) -> Entry:
    """Where the first of the largest or smallest values of a dim is, or of all values."""

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
    """The mean square of distances from the mean, over one value less unless it says otherwise."""
    less = (1 if unbiased else 0) if correction is None else correction
    axes = _axes(g, dim)
    centred = g.op("Sub", input, g.op("ReduceMean", input, axes, keepdims=1))
    squares = g.op("Mul", centred, centred)
    if less == 0:
        return g.op("ReduceMean", squares, axes, keepdims=int(keepdim))
    over = range(len(input.shape)) if axes is None else [dim] if isinstance(dim, int) else dim
    count: Any = g.constant(1, input.dtype)
    for d in over or ():
        count = g.op("Mul", count, g.cast(g.op("Squeeze", g.length(input, d)), input.dtype))
    free = g.op("Max", g.op("Sub", count, g.constant(less, input.dtype)), g.constant(0, input.dtype))
    return g.op("Div", g.op("ReduceSum", squares, axes, keepdims=int(keepdim)), free)


def std(g: Lowering, input: Value, **given: Any) -> str:
    return g.op("Sqrt", var(g, input, **given))


def vector_norm(
    g: Lowering, input: Value, ord: float = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None
) -> str:
    """The p-norm for any p, with the limits for 0 and both infinities."""
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
    """`softmax` or its logarithm, in the dtype of the result."""

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
    """Of equal values the earlier one comes first in TopK, whichever way it looks: it is stable."""
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
    """A product of matrices and what is added to it; `baddbmm` is the same with a batch."""
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
    """Padded by a number on both sides, or so that the length stays."""
    if isinstance(padding, str):
        missing = dilation[0] * (weight.shape[2] - 1) if padding == "same" else 0
        pads = [missing // 2, missing - missing // 2]
    else:
        pads = [padding[0], padding[0]]
    # A batch dim is what ONNX always has and torch may leave out.
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
