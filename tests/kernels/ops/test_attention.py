from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmc.kernels.ops import attention

H, HK, D, DV = 6, 2, 8, 5
SCALE = 0.4


def exact(
    q, k, v, scale, causal=True, window=None, chunk=None, softcap=None, sinks=None, slopes=None, bias=None
) -> np.ndarray:
    """Compute attention in loops over queries, heads and keys, with a plain softmax."""
    q, k, v = (tensor.double().numpy() for tensor in (q, k, v))
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if bias is not None:
        bias = bias.double().expand(batch, heads, queries, keys).numpy()
    out = np.zeros((batch, heads, queries, v.shape[3]))
    for b, h, i in np.ndindex(batch, heads, queries):
        position, kv = keys - queries + i, h * k.shape[1] // heads
        total = 0.0 if sinks is None else math.exp(sinks[h])
        for j in range(keys):
            if causal and j > position:
                continue
            if window is not None and j <= position - window:
                continue
            if chunk is not None and math.floor(j / chunk) != math.floor(position / chunk):
                continue
            score = scale * float(q[b, h, i] @ k[b, kv, j])
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            if slopes is not None:
                score += float(slopes[h]) * (j - position)
            if bias is not None:
                score += float(bias[b, h, i, j])
            total += math.exp(score)
            out[b, h, i] += math.exp(score) * v[b, kv, j]
        if total:
            out[b, h, i] /= total
    return out


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float64, kv_heads: int = HK) -> tuple:
    """Return random q, k and v, transposed views of [B, S, H, D] as in models."""
    shapes = [(2, queries, H, D), (2, keys, kv_heads, D), (2, keys, kv_heads, DV)]
    return tuple(torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)


CASES = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window": {"window": 3},
    "bidirectional window": {"causal": False, "window": 3},
    "chunk": {"chunk": 3},
    "window in chunk": {"window": 2, "chunk": 4},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 2, H)},
    "slopes": {"slopes": torch.linspace(0.1, 0.9, H)},
    "bias": {"bias": torch.linspace(-2, 2, 7).view(1, 1, 1, 7)},
    "all": {
        "window": 4,
        "chunk": 5,
        "softcap": 1.5,
        "sinks": torch.linspace(-1, 2, H),
        "slopes": torch.linspace(0.1, 0.9, H),
        "bias": torch.linspace(-2, 2, H).view(H, 1, 1),
    },
}


@pytest.mark.parametrize("queries", [7, 3, 1])
@pytest.mark.parametrize("case", CASES)
def test_attention(check, case: str, queries: int):
    args = (*inputs(queries, 7), SCALE)
    check(attention, args, CASES[case], exact(*args, **CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "all"])
def test_dtypes(check, case: str, dtype: torch.dtype):
    extra = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in CASES[case].items()}
    args = (*inputs(5, 7, dtype), SCALE)
    check(attention, args, extra, exact(*args, **extra))


@pytest.mark.parametrize("kv_heads", [1, H])
def test_head_counts(check, kv_heads: int):
    args = (*inputs(4, 6, kv_heads=kv_heads), SCALE)
    check(attention, args, {}, exact(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "bidirectional", "all"])
def test_contract(contract, case: str, dtype: torch.dtype):
    contract(attention, (*inputs(5, 7, dtype), SCALE), CASES[case])


def test_scores_beyond_the_float16_range(check):
    q, k, v = inputs(3, 5, torch.float16)
    args = (q * 0 + 200, k.sign() * 200, v, 1e-4)
    check(attention, args, {}, exact(*args))


@pytest.mark.parametrize("sinks", [None, torch.zeros(H)])
def test_a_query_that_sees_no_key_returns_zeros(check, sinks: torch.Tensor | None):
    args = (*inputs(5, 2), SCALE)  # the queries have positions -3..1
    check(attention, args, {"sinks": sinks}, exact(*args, sinks=sinks))
    assert not attention(*args, sinks=sinks)[:, :, :3].any()
    hidden = torch.zeros(2, 1, 5, 7, dtype=torch.float64)
    hidden[1, :, 2] = -math.inf
    args = (*inputs(5, 7), SCALE)
    assert not attention(*args, sinks=sinks, bias=hidden)[1, :, 2].any()


def test_exp_of_large_scores_does_not_overflow():
    q, k, v = inputs(5, 7)
    assert attention(1e4 * q, k, v, SCALE).isfinite().all()
    assert not attention(q, k, v, SCALE, sinks=torch.full((H,), 1e5)).any()


def test_the_result_is_contiguous():
    assert attention(*inputs(5, 7), SCALE).is_contiguous()


@pytest.mark.parametrize("case", [case for case in CASES if case != "bias"])
def test_tracing(traces, case: str):
    small = tuple(tensor[:1, :, :1] for tensor in inputs(7, 7, torch.float32))
    traces(
        lambda q, k, v: attention(q, k, v, SCALE, **CASES[case]),
        inputs(7, 7, torch.float32),
        small,
        ("BhSd", "BhSd", "BhSd"),
    )


def test_tracing_a_bias(traces):
    traces(
        lambda q, k, v, bias: attention(q, k, v, SCALE, bias=bias),
        (*inputs(7, 7, torch.float32), torch.randn(2, H, 7, 7)),
        (*(tensor[:1, :, :1] for tensor in inputs(7, 7, torch.float32)), torch.randn(1, H, 1, 1)),
        ("BhSd", "BhSd", "BhSd", "BhSS"),
    )
