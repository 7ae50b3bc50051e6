"""Linears and embeddings over rounded weights: in both tables the op's own meaning, in every scheme."""

from __future__ import annotations

import pytest
import torch
from calling import SIZES, calling, check_call, random, run_in_onnx
from check_pass import inputs
from rounding_kinds import KINDS, OUTPUTS, lookup, product, rounded, scheme_of
from torch import Tensor

from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.compiler.targets.ort.contrib import CONTRIB

TABLES = {"standard": STANDARD, "contrib": CONTRIB}
# Groups: one alone, an odd number of them, an even one, and such as no kernel takes as they are or at all.
CASES = [
    *((kind, group, 96) for kind in KINDS for group in (96, 32, 16) if not kind.startswith("fp8")),
    *((kind, group, 192) for kind in KINDS for group in (48, 24) if not kind.startswith("fp8")),
    ("int8", 256, 256),
    ("int4 with zeros", 256, 768),
    *((kind, group, 256) for kind in ("fp8", "fp8_e5m2") for group in (256, 128)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "group", "width"), CASES)
def test_rounded_weights_in_the_standard(kind: str, group: int, width: int, bias: bool) -> None:
    parts = rounded(kind, group, width)
    call = product(kind, group, bias=bias, parts=parts)
    check_call(call, STANDARD, width, tolerance=1e-4, as_written=True, **parts, bias=random(OUTPUTS, seed=2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "group", "width"), CASES)
def test_rounded_weights_in_onnx_runtime(kind: str, group: int, width: int, bias: bool) -> None:
    """Kernels for integers round the input to int8 block by block: an error of 0.3% of its largest number each."""
    parts = rounded(kind, group, width)
    call = product(kind, group, bias=bias, parts=parts)
    program = calling(call, width, **parts, bias=random(OUTPUTS, seed=2) * 10)
    run = run_in_onnx(program, CONTRIB)
    for size in SIZES:
        got, want = run(*inputs(*size)), program(*inputs(*size))
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < (0.012 if scheme_of(kind) in ("int8", "int4") else 1e-5), error


ROUNDED_INPUTS = [
    *(("int8", group, "int8") for group in (96, 32)),
    *((kind, group, "int8") for kind in ("int4", "int4 with zeros", "int8 with zeros") for group in (96, 32)),
    ("int4 of a checkpoint with zeros", 32, "int8"),
    *((kind, 96, activation) for kind in ("fp8", "fp8_e5m2", "int8") for activation in ("fp8", "fp8_e5m2")),
    ("fp8", 96, "int8"),
    ("nf4", 32, "int8"),
    ("nf4", 32, "fp8"),
]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("kind", "group", "activation"), ROUNDED_INPUTS)
def test_rounded_inputs_are_exact(kind: str, group: int, activation: str, table: str, static: bool) -> None:
    """Both sides are on their grids, so nothing but the last float operations may differ."""
    parts = rounded(kind, group, 96)
    # Of the inputs, which reach to 3, some lie beyond the grid.
    given = {"bias": random(OUTPUTS, seed=2), "x_scale": torch.tensor(2.2 / (127 if activation == "int8" else 448))}
    call = product(kind, group, activation, bias=True, static=static, parts=parts)
    check_call(call, TABLES[table], 96, tolerance=1e-4, as_written=True, **parts, **given)


@pytest.mark.parametrize("activation", ["int8", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("table", TABLES)
def test_a_row_of_zeros_and_one_of_huge_numbers(table: str, activation: str) -> None:
    parts = rounded("int8", 96, 96)

    def call(m: object, x: Tensor, positions: Tensor) -> Tensor:
        tilted = x * torch.where(positions % 3 == 0, 0.0, torch.where(positions % 3 == 1, 1e6, 1.0)).unsqueeze(-1)
        # Huge rows would hide the others in a comparison.
        y = product("int8", 96, activation, parts=parts)(m, tilted, positions)
        return y / (tilted.abs().amax(-1, keepdim=True) + 1)

    check_call(call, TABLES[table], 96, tolerance=2e-5, as_written=True, **parts)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("kind", "group", "width"), CASES)
def test_a_rounded_table(kind: str, group: int, width: int, table: str) -> None:
    parts = rounded(kind, group, width)
    check_call(lookup(kind, group, parts), TABLES[table], width, **parts)
