"""Codes of quantized inputs equal those of the dialect, also where they saturate."""

from __future__ import annotations

import pytest
import torch
from check_lowering import run_in_onnx, traced
from torch import Tensor

from llmc.compiler.targets.onnx.graph import Value
from llmc.compiler.targets.onnx.lower import Lowering
from llmc.compiler.targets.onnx.quantized_inputs import quantized_input
from llmc.kernels.ops.quantized import FLOAT8, quantize_activation

ACTIVATIONS = ["int8", *FLOAT8]


def codes_in_onnx(x: Tensor, activation: str, x_scale: float | None) -> Tensor:
    """Quantize x [B, S, I] in ONNX Runtime; the codes replace a traced negation."""

    def quantize(g: Lowering, input: Value) -> str:
        static = None if x_scale is None else g.constant(x_scale)
        return quantized_input(g, input, activation, static)[0]

    return run_in_onnx(traced(torch.neg, (torch.randn(2, 5, x.shape[-1]),)), {"aten.neg": quantize})(x)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("x_scale", [None, 0.011])
def test_codes_equal_the_dialects(activation: str, x_scale: float | None) -> None:
    x = torch.randn(40, 16, 48, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2, 0, 0], x[3] = 0, x[1] * 1e-30, 1e6, x[3] * 1e20
    expected, _ = quantize_activation(x, activation, None if x_scale is None else torch.tensor(x_scale))
    assert torch.equal(codes_in_onnx(x, activation, x_scale), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_saturate(activation: str) -> None:
    largest = [127.0, 448.0, 57344.0]
    values = [f * code for code in largest for f in (0.999, 1.0, 1.001, 1.0357, 1.036, 1.07)]
    values += [1e9, 3e38, float("inf")]
    x = torch.tensor([*values, *(-value for value in values)]).view(1, 1, -1)
    expected, _ = quantize_activation(x, activation, torch.tensor(1.0))
    got = codes_in_onnx(x, activation, 1.0)
    assert torch.equal(got, expected) and got.isfinite().all()


@pytest.mark.parametrize("activation", FLOAT8)
def test_nan_remains_nan(activation: str) -> None:
    x = torch.tensor([[[float("nan"), 1.0, 2.0]]])
    assert codes_in_onnx(x, activation, 1.0).isnan().tolist() == [[[True, False, False]]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ties_round_to_even(activation: str) -> None:
    if activation == "int8":
        x = torch.arange(-128, 128) + 0.5
    else:
        levels = torch.arange(256, dtype=torch.uint8).view(FLOAT8[activation]).float()
        levels = levels[levels.isfinite()].sort().values
        x = (levels[1:] + levels[:-1]) / 2
    expected, _ = quantize_activation(x, activation, torch.tensor(1.0))
    assert torch.equal(codes_in_onnx(x.view(1, 1, -1), activation, 1.0).flatten(), expected)
