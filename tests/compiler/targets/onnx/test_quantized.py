"""Quantized linear layers and embeddings equal the ops' meaning in both tables."""

from __future__ import annotations

import pytest
import torch
from calling import SIZES, calling, check_call, random, run_in_onnx
from check_pass import inputs
from quantization_kinds import KINDS, OUTPUTS, lookup, product, quantized_parts, scheme_of
from torch import Tensor

from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.compiler.targets.ort.contrib import CONTRIB

TABLES = {"standard": STANDARD, "contrib": CONTRIB}
# One group, an odd and an even number of groups, and group sizes that kernels support only as smaller ones or not.
CASES = [
    *((kind, group, 96) for kind in KINDS for group in (96, 32, 16) if not kind.startswith("fp8")),
    *((kind, group, 192) for kind in KINDS for group in (48, 24) if not kind.startswith("fp8")),
    ("int8", 256, 256),
    ("int4 with zeros", 256, 768),
    *((kind, group, 256) for kind in ("fp8", "fp8_e5m2") for group in (256, 128)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "group", "width"), CASES)
def test_quantized_weights_in_standard_ops(kind: str, group: int, width: int, bias: bool) -> None:
    parts = quantized_parts(kind, group, width)
    call = product(kind, group, bias=bias, parts=parts)
    check_call(call, STANDARD, width, tolerance=1e-4, as_written=True, **parts, bias=random(OUTPUTS, seed=2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "group", "width"), CASES)
def test_quantized_weights_in_contrib_ops(kind: str, group: int, width: int, bias: bool) -> None:
    """Integer kernels quantize inputs to int8 per block: 0.3% error of the maximum."""
    parts = quantized_parts(kind, group, width)
    call = product(kind, group, bias=bias, parts=parts)
    program = calling(call, width, **parts, bias=random(OUTPUTS, seed=2) * 10)
    run = run_in_onnx(program, CONTRIB)
    for size in SIZES:
        got, expected = run(*inputs(*size)), program(*inputs(*size))
        error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < (0.012 if scheme_of(kind) in ("int8", "int4") else 1e-5), error


QUANTIZED_INPUTS = [
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
@pytest.mark.parametrize(("kind", "group", "activation"), QUANTIZED_INPUTS)
def test_quantized_inputs_are_exact(kind: str, group: int, activation: str, table: str, static: bool) -> None:
    """Input and weight are codes, so only the final float operations may differ."""
    parts = quantized_parts(kind, group, 96)
    # Inputs range up to 3, so with this scale some of them saturate.
    tensors = {"bias": random(OUTPUTS, seed=2), "x_scale": torch.tensor(2.2 / (127 if activation == "int8" else 448))}
    call = product(kind, group, activation, bias=True, static=static, parts=parts)
    check_call(call, TABLES[table], 96, tolerance=1e-4, as_written=True, **parts, **tensors)


@pytest.mark.parametrize("activation", ["int8", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("table", TABLES)
def test_tokens_of_zeros_and_of_huge_numbers(table: str, activation: str) -> None:
    parts = quantized_parts("int8", 96, 96)

    def call(m: object, x: Tensor, positions: Tensor) -> Tensor:
        scaled = x * torch.where(positions % 3 == 0, 0.0, torch.where(positions % 3 == 1, 1e6, 1.0)).unsqueeze(-1)
        y = product("int8", 96, activation, parts=parts)(m, scaled, positions)
        # Without this division, the tolerance would depend on the huge tokens only.
        return y / (scaled.abs().amax(-1, keepdim=True) + 1)

    check_call(call, TABLES[table], 96, tolerance=2e-5, as_written=True, **parts)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("kind", "group", "width"), CASES)
def test_quantized_embeddings(kind: str, group: int, width: int, table: str) -> None:
    parts = quantized_parts(kind, group, width)
    check_call(lookup(kind, group, parts), TABLES[table], width, **parts)
