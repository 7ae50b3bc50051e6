from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmc.kernels.ops import moe

TOKENS, HIDDEN, INNER, EXPERTS = 6, 8, 5, 4
IDS = torch.tensor([[0, 3], [1, 2], [3, 3], [-1, 2], [4, 0], [-1, 9]])
ACTS = {"silu": lambda z, alpha: z / (1 + np.exp(-alpha * z)), "relu2": lambda z, _: np.maximum(z, 0.0) ** 2}


def exact(x, ids, weights, w_in, w_out, b_in, b_out, act, gated=True, alpha=1.0, limit=math.inf, offset=0.0):
    """Compute the experts in loops over tokens and their selected experts."""
    x, weights, w_in, w_out = (tensor.double().numpy() for tensor in (x, weights, w_in, w_out))
    out = np.zeros(x.shape)
    for t, k in np.ndindex(*ids.shape):
        expert = int(ids[t, k])
        if expert not in range(EXPERTS):
            continue
        hidden = w_in[expert] @ x[t] + (0.0 if b_in is None else b_in[expert].double().numpy())
        if gated:
            gate, up = hidden[:INNER], hidden[INNER:]
            hidden = ACTS[act](np.minimum(gate, limit), alpha) * (np.clip(up, -limit, limit) + offset)
        else:
            hidden = ACTS[act](hidden, alpha)
        y = w_out[expert] @ hidden + (0.0 if b_out is None else b_out[expert].double().numpy())
        out[t] += weights[t, k] * y
    return out


def inputs(dtype: torch.dtype, gated: bool = True, bias: bool = False) -> tuple:
    channels = 2 * INNER if gated else INNER
    shapes = [(TOKENS, HIDDEN), (TOKENS, 2), (EXPERTS, channels, HIDDEN), (EXPERTS, HIDDEN, INNER)]
    x, weights, w_in, w_out = (torch.randn(shape).to(dtype) for shape in shapes)
    biases = [torch.randn(shape).to(dtype) if bias else None for shape in ((EXPERTS, channels), (EXPERTS, HIDDEN))]
    return x, IDS, weights, w_in, w_out, *biases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_moe(check, dtype: torch.dtype, gated: bool, bias: bool):
    args = inputs(dtype, gated, bias)
    act = "silu" if gated else "relu2"
    check(moe, (*args, act), {"gated": gated}, exact(*args, act, gated))


def test_alpha_limit_and_offset(check):
    args = inputs(torch.float64, bias=True)
    extra = {"alpha": 1.702, "limit": 1.0, "offset": 1.0}
    check(moe, (*args, "silu"), extra, exact(*args, "silu", **extra))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract(contract, dtype: torch.dtype):
    contract(moe, (*inputs(dtype, bias=True), "silu"), {"alpha": 1.702, "limit": 1.0, "offset": 1.0})
    contract(moe, (*inputs(dtype, gated=False), "relu2"), {"gated": False})


def test_an_overflowing_expert_affects_only_its_own_tokens():
    x, ids, weights, w_in, w_out, b_in, b_out = inputs(torch.float32)
    w_in[1] = math.inf
    y = moe(x, ids, weights, w_in, w_out, b_in, b_out, "silu")
    assert y.isfinite().all(-1).tolist() == [True, False, True, True, True, True]


def test_limit_and_offset_without_a_gate_are_refused():
    args = inputs(torch.float32, gated=False)
    with pytest.raises(ValueError, match=r"limit=1\.0"):
        moe(*args, "relu2", gated=False, limit=1.0)
    with pytest.raises(ValueError, match=r"offset=1\.0"):
        moe(*args, "relu2", gated=False, offset=1.0)


def test_tracing(traces):
    x, ids, weights, *rest = inputs(torch.float32)
    traces(
        lambda x, ids, weights: moe(x, ids, weights, *rest, "silu"),
        (x, ids, weights),
        (x[:1], ids[:1], weights[:1]),
        ("Sh", "Sk", "Sk"),
    )
