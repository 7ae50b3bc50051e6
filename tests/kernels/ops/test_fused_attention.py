"""The fused op against plain loops: rows of heads, rotated by their positions, over what the caches hold."""

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


def tables(turned: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(20.0)[:, None] * 0.7 ** torch.arange(turned // 2)
    return angles.cos(), angles.sin()


def rotated(rows: np.ndarray, positions: np.ndarray, cos: Any, sin: Any, interleaved: bool) -> np.ndarray:
    """[B, S, heads, D]: pair by pair, each a complex number that is turned."""
    out = rows.copy()
    half = cos.shape[1]
    for b, s, pair in np.ndindex(rows.shape[0], rows.shape[1], half):
        one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        angle = complex(cos[positions[b, s], pair], sin[positions[b, s], pair])
        turned = (rows[b, s, :, one] + 1j * rows[b, s, :, other]) * angle
        out[b, s, :, one], out[b, s, :, other] = turned.real, turned.imag
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
        at = positions[b, s]
        keys[b, :, at], values[b, :, at] = k[b, s], v[b, s]
        for h in range(heads):
            total = 0.0 if sinks is None else math.exp(sinks[h])
            for j in range(max(0, at - window + 1) if window else 0, at + 1):
                score = scale * float(q[b, s, h] @ keys[b, h * HK // heads, j])
                score = score if softcap is None else softcap * math.tanh(score / softcap)
                total += math.exp(score)
                out[b, s, h] += math.exp(score) * values[b, h * HK // heads, j]
            out[b, s, h] /= total
    return out.reshape(*positions.shape, -1), keys, values


def arguments(
    dtype: torch.dtype = torch.float64,
    turned: int | None = None,
    interleaved: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Any, ...]:
    q, k, v = (torch.randn(B, COUNT, width).to(dtype) for width in (H * D, HK * D, HK * DV))
    caches = torch.randn(B, HK, MAX, D).to(dtype), torch.randn(B, HK, MAX, DV).to(dtype)
    cos, sin = (None, None) if turned is None else tables(turned)
    return q, k, v, *caches, torch.tensor(STARTS), H, SCALE, cos, sin, interleaved, window, softcap, sinks


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotated": {"turned": D},
    "rotated in part": {"turned": 4},
    "neighbours rotated": {"turned": D, "interleaved": True},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "all": {"turned": 4, "interleaved": True, "window": 5, "softcap": 1.5, "sinks": SINKS},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_values(check, name: str, packed: bool):
    args = arguments(**VARIANTS[name])
    want = exact(*args)
    if packed:
        args = (torch.cat(args[:3], -1), None, None, *args[3:])
    check(fused_attention, args, {}, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(check, dtype: torch.dtype):
    """Without a rotation, which is rounded before attention sees it."""
    args = arguments(dtype, window=5, softcap=1.5, sinks=SINKS)
    check(fused_attention, args, {}, exact(*args))


@pytest.mark.parametrize("packed", [False, True])
def test_contract(contract, packed: bool):
    args = arguments(torch.float32, turned=D)
    contract(fused_attention, (torch.cat(args[:3], -1), None, None, *args[3:]) if packed else args)
    contract(fused_attention, (*(x[:, :1] for x in args[:3]), *args[3:]))


def test_the_old_caches_stay():
    args = arguments()
    before = [x.clone() for x in args[3:5]]
    fused_attention(*args)
    assert all(torch.equal(now, then) for now, then in zip(args[3:5], before, strict=True))


def test_tracing(traces):
    args = arguments(torch.float32, turned=D)
    tensors, rest = args[:6], args[6:]
    small = *(x[:1, :1] for x in tensors[:3]), *(x[:1] for x in tensors[3:])
    traces(lambda *xs: fused_attention(*xs, *rest), tensors, small, ("BSd", "BSd", "BSd", "Bhmd", "Bhmd", "B"))
