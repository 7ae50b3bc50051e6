"""Quantization schemes of target "ort", and others made like them."""

from __future__ import annotations

from llmc.compiler.targets.ort.facts import FACTS, GROUP_SIZES
from llmc.passes.quantize.schemes import Grid, Scheme

SCHEMES = FACTS.schemes
STORED = FACTS.stored
WIDE = Grid("int8", 128)


def scheme(
    name: str, linears: Grid | None, wide: Grid | None = WIDE, small: Grid | None = None, small_below: int = 500_000_000
) -> Scheme:
    """Return a scheme whose groups are those of target "ort"."""
    return Scheme(name, linears, wide, small, small_below, GROUP_SIZES)
