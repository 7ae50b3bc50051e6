"""Arithmetic, comparisons and logic of tensors, in ONNX."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ....ir.nodes import value_of
from .graph import Value
from .lower import Entry, Lowering, Table

Operand = Any  # a Value, or a Python number

# The logical ops that replace arithmetic on bools.
_ON_BOOLS = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


def operand(g: Lowering, x: Operand, dtype: torch.dtype) -> Value:
    """Return a tensor of this dtype from a tensor, a size or a number."""
    return g.cast(x, dtype) if isinstance(x, Value) else g.constant(x, dtype)


def result(g: Lowering) -> torch.dtype:
    return value_of(g.node).dtype


def op(g: Lowering, kind: str, *inputs: str) -> str:
    """Write a node whose inputs and result have the dtype of the program's node."""
    return g.op(_ON_BOOLS.get(kind, kind) if result(g) == torch.bool else kind, *inputs)


# Unary ops ---------------------------------------------------------------------------------------------------------


def unary(kind: str) -> Entry:
    return lambda g, input: g.op(kind, operand(g, input, result(g)))


def relu(g: Lowering, input: Value) -> str:
    if input.dtype.is_floating_point:
        return g.op("Relu", input)
    return g.op("Max", input, g.constant(0, input.dtype))


def asked_of_floats(kind: str) -> Entry:
    """Return an entry for a predicate that ONNX defines for floats only."""
    return lambda g, input: g.op(kind, input if input.dtype.is_floating_point else g.cast(input, torch.float32))


def bitwise_not(g: Lowering, input: Value) -> str:
    return g.op("Not" if input.dtype == torch.bool else "BitwiseNot", input)


def logical_not(g: Lowering, input: Value) -> str:
    return g.op("Not", g.cast(input, torch.bool))


def square(g: Lowering, input: Value) -> str:
    x = operand(g, input, result(g))
    return op(g, "Mul", x, x)


def rsqrt(g: Lowering, input: Value) -> str:
    return g.op("Reciprocal", g.op("Sqrt", operand(g, input, result(g))))


def silu(g: Lowering, input: Value) -> str:
    return g.op("Mul", input, g.op("Sigmoid", input))


def gelu(g: Lowering, input: Value, approximate: str = "none") -> str:
    return g.op("Gelu", input, approximate=approximate)


def log2(g: Lowering, input: Value) -> str:
    return g.op("Div", g.op("Log", operand(g, input, result(g))), g.constant(math.log(2), result(g)))


def expm1(g: Lowering, input: Value) -> str:
    """Write tanh(x / 2) (exp(x) + 1), which is more accurate near 0 than exp(x) - 1."""
    x = operand(g, input, result(g))
    half = g.op("Tanh", g.op("Mul", x, g.constant(0.5, result(g))))
    return g.op("Mul", half, g.op("Add", g.op("Exp", x), g.constant(1, result(g))))


def log1p(g: Lowering, input: Value) -> str:
    """Write 2 atanh(x / (2 + x)) for x < 1, which is more accurate than log(1 + x)."""
    x = operand(g, input, result(g))
    one, two = (g.constant(n, result(g)) for n in (1, 2))
    near = g.op("Mul", two, g.op("Atanh", g.op("Div", x, g.op("Add", two, x))))
    return g.op("Where", g.op("Less", x, one), near, g.op("Log", g.op("Add", one, x)))


def softplus(g: Lowering, input: Value, beta: float = 1, threshold: float = 20) -> str:
    """Write log(1 + exp(beta x)) / beta, or x if beta x is above the threshold."""
    scaled = input if beta == 1 else g.op("Mul", input, g.constant(beta, input.dtype))
    soft = g.op("Softplus", scaled)
    soft = soft if beta == 1 else g.op("Div", soft, g.constant(beta, input.dtype))
    if threshold >= 20:  # both are equal in float32
        return soft
    return g.op("Where", g.op("Greater", scaled, g.constant(threshold, input.dtype)), input, soft)


def log_sigmoid(g: Lowering, input: Value) -> str:
    return g.op("Neg", g.op("Softplus", g.op("Neg", input)))


def leaky_relu(g: Lowering, input: Value, negative_slope: float = 0.01) -> str:
    return g.op("LeakyRelu", input, alpha=float(negative_slope))


def elu(g: Lowering, input: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> str:
    """Write scale * (max(x, 0) + alpha * (exp(input_scale * min(x, 0)) - 1))."""
    positive = g.op("Relu", input)
    negative = g.op("Min", input, g.constant(0, input.dtype))
    exponential = g.op("Elu", g.op("Mul", negative, g.constant(input_scale, input.dtype)), alpha=float(alpha))
    return g.op("Mul", g.op("Add", positive, exponential), g.constant(scale, input.dtype))


def clamp(g: Lowering, input: Value, min: Operand = None, max: Operand = None) -> str:
    """Clamp to bounds that are numbers, sizes or tensors; returns `max` if min > max."""
    value: Any = operand(g, input, result(g))
    for kind, bound in (("Max", min), ("Min", max)):
        if bound is not None:
            value = op(g, kind, value, operand(g, bound, result(g)))
    return value


def hardtanh(g: Lowering, input: Value, min_val: float = -1, max_val: float = 1) -> str:
    return clamp(g, input, min_val, max_val)


def to(g: Lowering, input: Value, **_: Any) -> str:
    return g.op("Identity", input) if input.dtype == result(g) else g.cast(input, result(g))


# Binary ops --------------------------------------------------------------------------------------------------------


def binary(kind: str) -> Entry:
    return lambda g, input, other: op(g, kind, operand(g, input, result(g)), operand(g, other, result(g)))


def _sum(g: Lowering, input: Operand, other: Operand, alpha: Any, kind: str) -> str:
    right = operand(g, other, result(g))
    if alpha != 1:
        right = op(g, "Mul", right, operand(g, alpha, result(g)))  # type: ignore[assignment]
    return op(g, kind, operand(g, input, result(g)), right)


def add(g: Lowering, input: Operand, other: Operand, alpha: Any = 1) -> str:
    return _sum(g, input, other, alpha, "Add")


def sub(g: Lowering, input: Operand, other: Operand, alpha: Any = 1) -> str:
    return _sum(g, input, other, alpha, "Sub")


def rsub(g: Lowering, input: Operand, other: Operand, alpha: Any = 1) -> str:
    return _sum(g, other, input, alpha, "Sub")


def mul(g: Lowering, input: Operand, other: Operand) -> str:
    if result(g).is_complex:
        return _complex_mul(g, input, other)
    return op(g, "Mul", operand(g, input, result(g)), operand(g, other, result(g)))


def _complex_mul(g: Lowering, input: Value, other: Value) -> str:
    """Multiply complex tensors, stored as pairs in an additional last dimension."""
    (a, b), (c, d) = (g.op("Split", x, axis=-1, num_outputs=2, count=2) for x in (input, other))
    real = g.op("Sub", g.op("Mul", a, c), g.op("Mul", b, d))
    return g.op("Concat", real, g.op("Add", g.op("Mul", a, d), g.op("Mul", b, c)), axis=-1)


def div(g: Lowering, input: Operand, other: Operand, rounding_mode: str | None = None) -> str:
    """Write the quotient: exact, truncated or rounded down."""
    if rounding_mode == "floor":
        return floor_divide(g, input, other)
    a, b = operand(g, input, result(g)), operand(g, other, result(g))
    quotient = g.op("Div", a, b)
    if rounding_mode is None or not result(g).is_floating_point:  # ONNX truncates quotients of integers
        return quotient
    return g.op("Mul", g.op("Sign", quotient), g.op("Floor", g.op("Abs", quotient)))


def remainder(g: Lowering, input: Operand, other: Operand) -> str:
    return _remainder(g, operand(g, input, result(g)), operand(g, other, result(g)))


def _remainder(g: Lowering, a: str, b: str) -> str:
    """Write the remainder with the divisor's sign, which ONNX has for integers only."""
    if not result(g).is_floating_point:
        return g.op("Mod", a, b)
    rest = g.op("Mod", a, b, fmod=1)
    differs = g.op("Less", g.op("Mul", rest, b), g.constant(0, result(g)))
    return g.op("Where", differs, g.op("Add", rest, b), rest)


def floor_divide(g: Lowering, input: Operand, other: Operand) -> str:
    """Write (a - remainder) / b, because a / b may be rounded up to an integer."""
    a, b = operand(g, input, result(g)), operand(g, other, result(g))
    quotient = g.op("Div", g.op("Sub", a, _remainder(g, a, b)), b)
    return g.op("Round", quotient) if result(g).is_floating_point else quotient


def fmod(g: Lowering, input: Operand, other: Operand) -> str:
    return g.op("Mod", operand(g, input, result(g)), operand(g, other, result(g)), fmod=1)


def power(g: Lowering, exponent: Operand, **base: Operand) -> str:
    """Write a power; base and exponent may be tensors or numbers."""
    (value,) = base.values()  # named `self` or `input`, as the base is a number or a tensor
    if isinstance(exponent, (int, float)) and exponent == 2:
        return square(g, value)
    return g.op("Pow", operand(g, value, result(g)), operand(g, exponent, result(g)))


def lerp(g: Lowering, input: Value, end: Value, weight: Operand) -> str:
    step = g.op("Mul", g.op("Sub", end, input), operand(g, weight, result(g)))
    return g.op("Add", input, step)


def addcmul(g: Lowering, input: Value, tensor1: Value, tensor2: Value, value: float = 1) -> str:
    product = op(g, "Mul", operand(g, tensor1, result(g)), operand(g, tensor2, result(g)))
    return _sum(g, input, Value(product, result(g)), value, "Add")


# Comparisons and logic ---------------------------------------------------------------------------------------------


def compare(kind: str, negated: bool = False) -> Entry:
    """Return an entry that compares in the dtype that torch promotes both sides to."""

    def entry(g: Lowering, input: Operand, other: Operand) -> str:
        dtype = _common(input, other)
        if dtype == torch.bool and kind != "Equal":
            dtype = torch.int32
        answer = g.op(kind, operand(g, input, dtype), operand(g, other, dtype))
        return g.op("Not", answer) if negated else answer

    return entry


def _common(*operands: Operand) -> torch.dtype:
    """Return the dtype that torch promotes operands to.

    Numbers, sizes and zero-dimensional tensors have a lower priority than tensors with dimensions.
    """
    examples: list[Any] = []
    for x in operands:
        if not isinstance(x, Value):
            examples.append(x)
        elif x.symbol:
            examples.append(1.0 if x.dtype.is_floating_point else 1)
        else:
            examples.append(torch.empty([1] * len(x.shape), dtype=x.dtype, device="meta"))
    return torch.result_type(*examples)


def logical(kind: str) -> Entry:
    return lambda g, input, other: g.op(kind, operand(g, input, torch.bool), operand(g, other, torch.bool))


def bitwise(kind: str) -> Entry:
    """Return an entry that works on bools or on the bits of integers."""

    def entry(g: Lowering, input: Operand, other: Operand) -> str:
        name = kind if result(g) == torch.bool else f"Bitwise{kind}"
        return g.op(name, operand(g, input, result(g)), operand(g, other, result(g)))

    return entry


def where(g: Lowering, condition: Value, input: Operand, other: Operand) -> str:
    """Select from two operands, promoted to the dtype of the result."""
    chosen, a, b = g.cast(condition, torch.bool), operand(g, input, result(g)), operand(g, other, result(g))
    if result(g) != torch.bool:
        return g.op("Where", chosen, a, b)
    return g.op("Or", g.op("And", chosen, a), g.op("And", g.op("Not", chosen), b))  # ONNX Runtime has no Where of bools


def masked_fill(g: Lowering, input: Value, mask: Value, value: Operand) -> str:
    return where(g, mask, value, input)


_UNARY = {
    **{name: name.capitalize() for name in "abs ceil cos erf exp floor log neg reciprocal round sigmoid".split()},
    **{name: name.capitalize() for name in "mish sign sin sqrt tan tanh".split()},
}
_COMPARISONS = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal"}
_LOGIC = {"and": "And", "or": "Or", "xor": "Xor"}

_ENTRIES: dict[str, Entry] = {
    **{name: unary(kind) for name, kind in _UNARY.items()},
    **{name: compare(kind) for name, kind in _COMPARISONS.items()},
    **{f"logical_{name}": logical(kind) for name, kind in _LOGIC.items()},
    **{f"bitwise_{name}": bitwise(kind) for name, kind in _LOGIC.items()},
    **{f"__{name}__": bitwise(kind) for name, kind in _LOGIC.items()},
    "add": add,
    "addcmul": addcmul,
    "bitwise_not": bitwise_not,
    "clamp": clamp,
    "clamp_max": clamp,
    "clamp_min": clamp,
    "div": div,
    "elu": elu,
    "expm1": expm1,
    "floor_divide": floor_divide,
    "fmod": fmod,
    "gelu": gelu,
    "hardtanh": hardtanh,
    "isinf": asked_of_floats("IsInf"),
    "isnan": asked_of_floats("IsNaN"),
    "leaky_relu": leaky_relu,
    "lerp": lerp,
    "log1p": log1p,
    "log2": log2,
    "log_sigmoid": log_sigmoid,
    "logical_not": logical_not,
    "masked_fill": masked_fill,
    "maximum": binary("Max"),
    "minimum": binary("Min"),
    "mul": mul,
    "ne": compare("Equal", negated=True),
    "pow": power,
    "relu": relu,
    "relu6": partial(hardtanh, min_val=0, max_val=6),
    "remainder": remainder,
    "rsqrt": rsqrt,
    "rsub": rsub,
    "silu": silu,
    "softplus": softplus,
    "square": square,
    "sub": sub,
    "to": to,
    "_to_copy": to,
    "type_as": to,
    "where": where,
}

ARITHMETIC: Table = {f"aten.{name}": entry for name, entry in _ENTRIES.items()}
