from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmc.kernels.ops import gated_act


def sigmoid(z: float) -> float:
    """Compute the sigmoid without overflow for any sign."""
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


ACTS = {
    "silu": lambda g, alpha: g * sigmoid(alpha * g),
    "gelu": lambda g, _: g * 0.5 * (1 + math.erf(g / math.sqrt(2))),
    "gelu_tanh": lambda g, _: g * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
    "relu": lambda g, _: max(g, 0.0),
    "relu2": lambda g, _: max(g, 0.0) ** 2,
    "sigmoid": lambda g, _: sigmoid(g),
}


def exact(gate, up, act: str, alpha: float = 1.0, limit: float = math.inf, offset: float = 0.0) -> np.ndarray:
    pairs = zip(gate.double().flatten().tolist(), up.double().flatten().tolist(), strict=True)
    out = [ACTS[act](min(g, limit), alpha) * (min(max(u, -limit), limit) + offset) for g, u in pairs]
    return np.array(out).reshape(gate.shape)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (4 * torch.randn(2, 5, 16)).to(dtype), (4 * torch.randn(2, 5, 16)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ACTS)
def test_gated_act(check, dtype: torch.dtype, act: str):
    gate, up = inputs(dtype)
    check(gated_act, (gate, up, act), {}, exact(gate, up, act))


@pytest.mark.parametrize("act", ACTS)
def test_limit_and_offset(check, act: str):
    gate, up = inputs(torch.float64)
    extra = {"limit": 3.0, "offset": 1.0}
    check(gated_act, (gate, up, act), extra, exact(gate, up, act, **extra))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_alpha(check, dtype: torch.dtype):
    gate, up = inputs(dtype)
    extra = {"alpha": 1.702, "limit": 3.0, "offset": 1.0}
    check(gated_act, (gate, up, "silu"), extra, exact(gate, up, "silu", **extra))


@pytest.mark.parametrize("act", ACTS)
def test_contract(contract, act: str):
    merged = torch.randn(2, 5, 16)
    contract(gated_act, (*merged.chunk(2, -1), act))
    contract(gated_act, (*inputs(torch.bfloat16), act))
    contract(gated_act, (*inputs(torch.float32), act), {"limit": 3.0, "offset": 1.0})


def test_refusals():
    gate, up = inputs(torch.float32)
    with pytest.raises(ValueError, match="alpha"):
        gated_act(gate, up, "gelu", alpha=1.702)
    with pytest.raises(ValueError, match="swish"):
        gated_act(gate, up, "swish")


def test_tracing(traces):
    large, small = torch.randn(2, 5, 8), torch.randn(1, 1, 8)
    traces(
        lambda gate, up: gated_act(gate, up, "silu", 1.702, 3.0, 1.0), (large, large), (small, small), ("BSh", "BSh")
    )
