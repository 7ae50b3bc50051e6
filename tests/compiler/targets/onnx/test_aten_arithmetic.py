"""Arithmetic, comparisons and logic in ONNX Runtime equal torch, dtype included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_lowering import check
from torch import Tensor
from torch.nn import functional as F

from llmc.compiler.targets.onnx.aten import ATEN

aten = torch.ops.aten


def make(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return floats and integers of both signs and zero, and bools, [B, S, 8]."""
    generator = torch.Generator().manual_seed(10 * batch + length)
    x = torch.randn(batch, length, 8, generator=generator) * 2
    x[..., 0] = 0.0
    i = torch.randint(-9, 9, x.shape, generator=generator)
    i[..., :2] = torch.tensor([0, -7])
    return x, i, torch.randint(0, 2, x.shape, generator=generator).bool()


def divisors(i: Tensor) -> Tensor:
    """Return integers of both signs without zero."""
    return torch.where(i == 0, 3, i).flip(-1)


def all_of(*functions: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda x, i, b: tuple(f(x) for f in functions)


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "unary": all_of(
        torch.abs, torch.ceil, torch.cos, torch.erf, torch.exp, torch.floor, torch.neg, torch.relu, torch.round,
        torch.sigmoid, torch.sign, torch.sin, torch.tan, torch.tanh, torch.square, F.silu, F.mish, F.softplus,
    ),
    "unary, positive": lambda x, i, b: (
        (x.abs() + 0.1).log(), x.abs().sqrt(), (x.abs() + 0.1).rsqrt(), (x.abs() + 0.1).reciprocal(), x.abs().log2(),
    ),
    "unary, integers": lambda x, i, b: (
        i.abs(), -i, i.sign(), i.square(), i.exp(), i.sigmoid(), i.abs().sqrt(), i.relu(), i.reciprocal(), i.cos(),
    ),
    "unary, bools": lambda x, i, b: (b.float().exp(), b.logical_not(), b.bitwise_not(), b.exp()),
    "rounding of ties": lambda x, i, b: ((i / 2).round(), (i / 2).floor(), (i / 2).ceil()),
    "gelu": lambda x, i, b: (F.gelu(x), F.gelu(x, approximate="tanh")),
    "silu": lambda x, i, b: (F.silu(x), F.elu(x), aten.elu(x, 2.0, 1.5, 0.5), F.leaky_relu(x, 0.2)),
    "hardtanh": lambda x, i, b: (F.relu6(x * 4), F.hardtanh(x), F.hardtanh(x, -0.5, 2)),
    "log_sigmoid": lambda x, i, b: F.logsigmoid(x * 20),
    "softplus": lambda x, i, b: (F.softplus(x * 20), F.softplus(x, beta=2.5), F.softplus(x, beta=2, threshold=1)),
    "near zero": lambda x, i, b: (torch.expm1(x * 1e-4) * 1e4, torch.log1p(x * 1e-4) * 1e4),
    "far from zero": lambda x, i, b: (torch.expm1(x * -40), torch.log1p(x.abs() * 1e6), torch.expm1(x.abs())),
    "add": lambda x, i, b: (x + i, i + i, i + 2, i + 1.5, x + True, b + b, b + i, b + 1, b + 0.5, x + x[0, 0]),
    "add, alpha": lambda x, i, b: (
        torch.add(x, i, alpha=2), torch.sub(i, i * 2, alpha=3), torch.rsub(x, 2, alpha=0.5), torch.rsub(i, i * 2),
    ),
    "sub": lambda x, i, b: (x - i, 2 - i, i - 1.5, 1 - x, i - b.long()),
    "mul": lambda x, i, b: (x * i, i * i, b * b, b * x, b * 3, i * 2.5, x * 2, x * x[..., :1]),
    "with sizes": lambda x, i, b: (x * x.shape[1], i + x.shape[0], x / x.shape[1], x.shape[1] - i, i // x.shape[1]),
    "div": lambda x, i, b: (x / 3, i / 2, i / divisors(i), 1 / divisors(i), b / 2, x / divisors(i)),
    "div, rounded": lambda x, i, b: (
        torch.div(i, divisors(i), rounding_mode="floor"), torch.div(i, divisors(i), rounding_mode="trunc"),
        torch.div(x, divisors(i), rounding_mode="floor"), torch.div(x, divisors(i), rounding_mode="trunc"),
        torch.div(i, 2.5, rounding_mode="trunc"), torch.div(i, -2, rounding_mode="floor"),
    ),
    "floor_divide": lambda x, i, b: (
        i // divisors(i), i // -4, x // 0.7, x // divisors(i), i // 2.5, torch.full_like(x, 0.3) // 0.1,
    ),
    "remainder": lambda x, i, b: (
        i % divisors(i), i % -4, x % 0.7, x % divisors(i), i % 2.5, 7 % divisors(i), -x % -0.3,
    ),
    "fmod": lambda x, i, b: (torch.fmod(i, divisors(i)), torch.fmod(i, -4), torch.fmod(x, 0.7), torch.fmod(x, -0.7)),
    "pow": lambda x, i, b: (
        x**2, i**2, i**3, x.abs() ** 0.5, x.abs() ** x, 2**x, i.abs() ** 2.5, (x.abs() + 1) ** -0.5,
    ),
    "lerp": lambda x, i, b: (torch.lerp(x, x * 2, 0.3), torch.lerp(x, -x, x)),
    "addcmul": lambda x, i, b: (torch.addcmul(x, x, i.float()), torch.addcmul(x, x, x, value=-2.0)),
    "clamp": lambda x, i, b: (
        x.clamp(-1, 1), x.clamp(min=0.5), x.clamp(max=-0.5), i.clamp(-3, 3), i.clamp(max=2.5),
        x.clamp(i * 0.1, i + 1.0),
        i.clamp(0, i.shape[1]), x.clamp(1, -1), x.clamp_min(0.2), x.clamp_max(0.2), aten.clamp_min(i, 1),
    ),
    "maximum": lambda x, i, b: (
        torch.maximum(x, i), torch.minimum(i, i * 2), torch.max(x, x * 2), torch.min(b, b.flip(0)),
    ),
    "comparisons": lambda x, i, b: (
        x > 0.5, x >= i, i < 2, i <= 1.5, x == 0, i != 3, b == b.flip(0), b > 0, b < b.flip(-1), x < b,
    ),
    "comparisons with sizes": lambda x, i, b: (i < x.shape[1], x >= x.shape[0], i == x.shape[1]),
    "comparisons with scalar tensors": lambda x, i, b: (
        i > torch.full((), 1.5), x > torch.full((), 1, dtype=torch.float64),
    ),
    "logic": lambda x, i, b: (
        torch.logical_and(b, x), torch.logical_or(i, b), torch.logical_xor(b, b.flip(0)), torch.logical_not(i),
    ),
    "bits": lambda x, i, b: (b & b.flip(0), b | b.flip(0), b ^ b.flip(0), ~b, i & 6, i | i * 2, i ^ 5, ~i, b & True),
    "isnan and isinf": lambda x, i, b: ((x / x).isnan(), (1 / x).isinf(), i.isnan(), torch.isinf(i)),
    "where": lambda x, i, b: (
        torch.where(b, x, -x), torch.where(b, x, i), torch.where(b, i, 2), torch.where(b, 1.5, i),
        torch.where(b, -1, 2), torch.where(x > 0, b, ~b), torch.where(b, x, float("-inf")),
        aten.where(b, x.double(), x),
    ),
    "masked_fill": lambda x, i, b: (
        x.masked_fill(b, float("-inf")), i.masked_fill(b, -3), b.masked_fill(b, False), x.masked_fill(b, x[0, 0, 1]),
        x.masked_fill(b[0, :1], 1),
    ),
    "casts": lambda x, i, b: (
        (x * 3).long(), (x * 3).int(), i.float(), b.long(), x.bool(), i.bool(), x.double(), i.type_as(x),
        x.to(x.dtype), b.float(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_arithmetic_equals_torch(name: str) -> None:
    check(CASES[name], make, ATEN)
