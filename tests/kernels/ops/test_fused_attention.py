"""Compare fused_attention with plain loops over tokens, heads and cached keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.kernels.ops import fused_attention

B, H, HK, D, DV, MAX = 2, 4, 2, 6, 4, 12
SCALE = 0.4
STARTS, COUNT = [7, 3], 4
SINKS = torch.linspace(-1, 2, H)


def tables(rotary_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(20.0)[:, None] * 0.7 ** torch.arange(rotary_dim // 2)
    return angles.cos(), angles.sin()


def rotated(x: np.ndarray, positions: np.ndarray, cos: Any, sin: Any, interleaved: bool) -> np.ndarray:
    """Rotate x [B, S, heads, D] with complex numbers, one per pair."""
    out = x.copy()
    half = cos.shape[1]
    for b, s, pair in np.ndindex(x.shape[0], x.shape[1], half):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        angle = complex(cos[positions[b, s], pair], sin[positions[b, s], pair])
        number = (x[b, s, :, first] + 1j * x[b, s, :, second]) * angle
        out[b, s, :, first], out[b, s, :, second] = number.real, number.imag
    return out


def exact(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, heads: int, scale: float,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, window: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    q, k, v = (x.double().unflatten(-1, (n, -1)).numpy() for x, n in ((q, heads), (k, HK), (v, HK)))
    positions = starts.numpy()[:, None] + np.arange(q.shape[1])
    if cos is not None and sin is not None:
        q, k = (rotated(x, positions, cos.double().numpy(), sin.double().numpy(), interleaved) for x in (q, k))
    keys, values = k_cache.double().numpy().copy(), v_cache.double().numpy().copy()
    out = np.zeros((q.shape[0], q.shape[1], heads, DV))
    for b, s in np.ndindex(*positions.shape):
        position = positions[b, s]
        keys[b, :, position], values[b, :, position] = k[b, s], v[b, s]
        for h in range(heads):
            total = 0.0 if sinks is None else math.exp(sinks[h])
            for j in range(max(0, position - window + 1) if window else 0, position + 1):
                score = scale * float(q[b, s, h] @ keys[b, h * HK // heads, j])
                score = score if softcap is None else softcap * math.tanh(score / softcap)
                total += math.exp(score)
                out[b, s, h] += math.exp(score) * values[b, h * HK // heads, j]
            out[b, s, h] /= total
    return out.reshape(*positions.shape, -1), keys, values


def arguments(
    dtype: torch.dtype = torch.float64,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Any, ...]:
    q, k, v = (torch.randn(B, COUNT, width).to(dtype) for width in (H * D, HK * D, HK * DV))
    caches = torch.randn(B, HK, MAX, D).to(dtype), torch.randn(B, HK, MAX, DV).to(dtype)
    cos, sin = (None, None) if rotary_dim is None else tables(rotary_dim)
    return q, k, v, *caches, torch.tensor(STARTS), H, SCALE, cos, sin, interleaved, window, softcap, sinks


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotated": {"rotary_dim": D},
    "partly rotated": {"rotary_dim": 4},
    "interleaved": {"rotary_dim": D, "interleaved": True},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "all": {"rotary_dim": 4, "interleaved": True, "window": 5, "softcap": 1.5, "sinks": SINKS},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_values(check, name: str, packed: bool):
    args = arguments(**VARIANTS[name])
    expected = exact(*args)
    if packed:
        args = (torch.cat(args[:3], -1), None, None, *args[3:])
    check(fused_attention, args, {}, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(check, dtype: torch.dtype):
    """Without rotation, because the reference does not round rotated queries."""
    args = arguments(dtype, window=5, softcap=1.5, sinks=SINKS)
    check(fused_attention, args, {}, exact(*args))


@pytest.mark.parametrize("packed", [False, True])
def test_contract(contract, packed: bool):
    args = arguments(torch.float32, rotary_dim=D)
    contract(fused_attention, (torch.cat(args[:3], -1), None, None, *args[3:]) if packed else args)
    contract(fused_attention, (*(x[:, :1] for x in args[:3]), *args[3:]))


def test_the_caches_are_not_modified():
    args = arguments()
    before = [x.clone() for x in args[3:5]]
    fused_attention(*args)
    assert all(torch.equal(now, earlier) for now, earlier in zip(args[3:5], before, strict=True))


def test_tracing(traces):
    args = arguments(torch.float32, rotary_dim=D)
    tensors, rest = args[:6], args[6:]
    small = *(x[:1, :1] for x in tensors[:3]), *(x[:1] for x in tensors[3:])
    traces(lambda *xs: fused_attention(*xs, *rest), tensors, small, ("BSd", "BSd", "BSd", "Bhmd", "Bhmd", "B"))
