"""Quantized weights of every kind: by a plan, or from a quantized checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from calling import random
from torch import Tensor

from llmc.kernels.ops import quant_embedding, quant_linear, round_weight
from llmc.kernels.ops.quantized import dequantize, pack_nibbles

OUTPUTS = 40
Parts = dict[str, Tensor]

# Name -> scheme; True if groups have zero points; True if they have multiples.
KINDS = {
    "int8": ("int8", False, False),
    "int8 with zeros": ("int8", True, False),
    "int4": ("int4", False, True),
    "int4 with zeros": ("int4", True, True),
    "int4 of a checkpoint": ("int4", False, False),
    "int4 of a checkpoint with zeros": ("int4", True, False),
    "fp8": ("fp8", False, False),
    "fp8_e5m2": ("fp8_e5m2", False, False),
    "nf4": ("nf4", False, False),
}


def scheme_of(kind: str) -> str:
    return KINDS[kind][0]


def quantized_parts(kind: str, group: int, inputs: int) -> Parts:
    """Quantize a weight whose groups differ in scale and in the sign of their largest number."""
    scheme, zeros, multiples = KINDS[kind]
    if scheme in ("int8", "int4") and not multiples and (zeros or scheme == "int4"):
        return _of_a_checkpoint(scheme, group, inputs, zeros)
    weight = random(OUTPUTS, inputs) * torch.linspace(0.2, 3, inputs)
    parts = round_weight(weight, scheme, group, not zeros)
    named = dict(zip(("codes", "scales", "zeros", "multiples"), parts, strict=True))
    found = {name: part for name, part in named.items() if part.numel()}
    assert (set(found) - {"codes", "scales"}) == {
        n for n, is_there in (("zeros", zeros), ("multiples", multiples)) if is_there
    }
    return found


def _of_a_checkpoint(scheme: str, group: int, inputs: int, zeros: bool) -> Parts:
    """Return random codes, with a float scale and optionally a zero point for each group."""
    generator = torch.Generator().manual_seed(1)
    groups = inputs // group
    low, high, dtype = (-128, 128, torch.int8) if scheme == "int8" else (0, 16, torch.uint8)
    codes = torch.randint(low, high, (OUTPUTS, inputs), generator=generator, dtype=dtype)
    parts = {"codes": codes if scheme == "int8" else pack_nibbles(codes)}
    parts["scales"] = (0.5 + torch.rand(OUTPUTS, groups, generator=generator)) / 100
    if zeros:
        parts["zeros"] = torch.randint(low, high, (OUTPUTS, groups), generator=generator, dtype=dtype)
    return parts


def numbers(kind: str, parts: Parts, group: int) -> Tensor:
    """Return the dequantized weight, [O, I]."""
    return dequantize(
        parts["codes"], parts["scales"], parts.get("zeros"), scheme_of(kind), group, multiples=parts.get("multiples")
    )


def product(
    kind: str, group: int, activation: str = "none", *, bias: bool = False, static: bool = False, parts: Parts
) -> Any:
    """Return a function that calls `quant_linear` with the parts, which are attributes of its module."""

    def call(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        zeros, multiples = (getattr(m, name) if name in parts else None for name in ("zeros", "multiples"))
        return quant_linear(
            x, m.codes, m.scales, zeros, m.bias if bias else None, scheme_of(kind), group, activation,
            m.x_scale if static else None, multiples,
        )  # fmt: skip

    return call


def lookup(kind: str, group: int, parts: Parts) -> Any:
    """Return a function that calls `quant_embedding` with the parts, which are attributes of its module."""

    def call(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        zeros, multiples = (getattr(m, name) if name in parts else None for name in ("zeros", "multiples"))
        return quant_embedding(positions + 3, m.codes, m.scales, zeros, scheme_of(kind), group, multiples)

    return call
