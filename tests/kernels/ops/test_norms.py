from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.kernels.ops import add_rms_norm, layer_norm, rms_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 0.1  # so large that the tests fail if it is missing, or added after the root


def vectors(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy().reshape(-1, x.shape[-1])


def exact_rms(x: torch.Tensor, weight: torch.Tensor | None) -> np.ndarray:
    out = [vector / np.sqrt(sum(value * value for value in vector) / len(vector) + EPS) for vector in vectors(x)]
    scaled = np.array(out) * (1.0 if weight is None else weight.double().numpy())
    return scaled.reshape(x.shape)


def exact_layer(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> np.ndarray:
    out = np.array([(vector - np.mean(vector)) / np.sqrt(np.var(vector) + EPS) for vector in vectors(x)])
    out = out * (1.0 if weight is None else weight.double().numpy()) + (0.0 if bias is None else bias.double().numpy())
    return out.reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(check, dtype: torch.dtype, weighted: bool):
    x = (3 * torch.randn(2, 5, 48) + 1).to(dtype)
    weight = torch.randn(48).to(dtype) if weighted else None
    check(rms_norm, (x, weight, EPS), {}, exact_rms(x, weight))


def test_rms_norm_of_squares_beyond_the_float16_range(check):
    x = torch.full((2, 8), 3000.0, dtype=torch.float16)
    check(rms_norm, (x, None, EPS), {}, exact_rms(x, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weighted", "biased"), [(True, True), (True, False), (False, False)])
def test_layer_norm(check, dtype: torch.dtype, weighted: bool, biased: bool):
    x = (3 * torch.randn(2, 5, 48) + 1).to(dtype)
    weight = torch.randn(48).to(dtype) if weighted else None
    bias = torch.randn(48).to(dtype) if biased else None
    check(layer_norm, (x, weight, bias, EPS), {}, exact_layer(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(check, dtype: torch.dtype):
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((2, 5, 48), (2, 5, 48), (48,)))
    total = x + residual
    check(add_rms_norm, (x, residual, weight, EPS), {}, (exact_rms(total, weight), x.double() + residual.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(contract, dtype: torch.dtype):
    x, weight = torch.randn(2, 5, 48).to(dtype), torch.randn(48).to(dtype)
    contract(rms_norm, (x, weight, EPS))
    contract(rms_norm, (x.transpose(0, 1), None, EPS))
    contract(rms_norm, (x.view(2, 5, 6, 8)[:, :, :4].transpose(1, 2), None, EPS))
    contract(layer_norm, (x, weight, weight, EPS))
    contract(layer_norm, (x, None, None, EPS))
    contract(add_rms_norm, (x, x, weight, EPS))
    contract(add_rms_norm, (x, x, None, EPS))


def test_tracing(traces):
    weight = torch.randn(48)
    small, large = torch.randn(1, 1, 48), torch.randn(2, 5, 48)
    traces(lambda x: rms_norm(x, weight, EPS), (large,), (small,), ("BSh",))
    traces(lambda x: layer_norm(x, weight, weight, EPS), (large,), (small,), ("BSh",))
    traces(lambda x, r: add_rms_norm(x, r, weight, EPS), (large, large), (small, small), ("BSh", "BSh"))
    heads = torch.randn(2, 5, 3, 48).transpose(1, 2)
    traces(lambda x: rms_norm(x, weight, EPS), (heads,), (torch.randn(1, 3, 1, 48),), ("BhSd",))
