"""Tensors from numbers and sizes, and Python's arithmetic on sizes, in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .aten_arithmetic import Operand, operand, result
from .graph import Value
from .lower import Entry, Lowering, Table


def arange(g: Lowering, end: Operand, start: Operand = 0, step: Operand = 1, **_: Any) -> str:
    return g.op("Range", *(operand(g, x, result(g)) for x in (start, end, step)))


def filled(value: float | None = None) -> Entry:
    """Return an entry for a constant tensor, whose size is given or that of `input`."""

    def entry(
        g: Lowering, size: Sequence[Any] | None = None, input: Value | None = None, fill_value: Operand = None, **_: Any
    ) -> str:
        shape = g.op("Shape", input) if size is None else g.sizes(size)
        return g.op("Expand", operand(g, fill_value if value is None else value, result(g)), shape)

    return entry


def scalar_tensor(g: Lowering, s: Operand, **_: Any) -> str:
    return g.op("Identity", operand(g, s, result(g)))


def eye(g: Lowering, n: Operand, m: Operand = None, **_: Any) -> Value:
    zeros = g.op("Expand", g.constant(0, torch.float32), g.sizes([n, n if m is None else m]))
    return g.cast(Value(g.op("EyeLike", zeros), torch.float32), result(g))


# Sizes are int64 scalars and their quotients float64, as in Python.


def on_sizes(kind: str) -> Entry:
    return lambda g, a, b: _scalar(g, kind, a, b)


def _scalar(g: Lowering, kind: str, *operands: Operand, dtype: torch.dtype | None = None) -> Value:
    common = dtype or (torch.float64 if any(map(_is_float, operands)) else torch.int64)
    return Value(g.op(kind, *(operand(g, x, common) for x in operands)), common)


def _is_float(x: Operand) -> bool:
    return x.dtype.is_floating_point if isinstance(x, Value) else isinstance(x, float)


def divided(g: Lowering, a: Operand, b: Operand) -> Value:
    return _scalar(g, "Div", a, b, dtype=torch.float64)


def divided_down(g: Lowering, a: Operand, b: Operand) -> Value:
    """Write a floor division: Python rounds down, ONNX towards zero."""
    return _scalar(g, "Div", _scalar(g, "Sub", a, _scalar(g, "Mod", a, b)), b)


def negated(g: Lowering, a: Operand) -> Value:
    return _scalar(g, "Neg", a)


def as_float(g: Lowering, a: Operand) -> Value:
    return operand(g, a, torch.float64)


SOURCES: Table = {
    "aten.arange": arange,
    "aten.eye": eye,
    "aten.scalar_tensor": scalar_tensor,
    **{f"aten.{name}": filled(0) for name in "empty_like new_empty new_zeros zeros zeros_like".split()},
    **{f"aten.{name}": filled(1) for name in "new_ones ones ones_like".split()},
    **{f"aten.{name}": filled() for name in "full full_like new_full".split()},
}

SIZES: Table = {
    "add": on_sizes("Add"),
    "floordiv": divided_down,
    "mod": on_sizes("Mod"),
    "mul": on_sizes("Mul"),
    "neg": negated,
    "pow": on_sizes("Pow"),
    "sub": on_sizes("Sub"),
    "sym_float": as_float,
    "sym_max": on_sizes("Max"),
    "sym_min": on_sizes("Min"),
    "truediv": divided,
}
