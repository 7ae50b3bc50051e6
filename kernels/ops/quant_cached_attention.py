"""Attention over a KV cache that stores keys and values in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cached_attention import attend_over, write
from .op import op
from .precision import accumulator
from .quantized import dequantize_cached, quantize_cached


def _shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **__: Any) -> Any:
    return q.new_empty(*q.shape[:3], v.shape[3]), *(cache.new_empty(cache.shape) for cache in rest[:4])


@op(fake=_shapes)
def quant_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    ring: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`cached_attention` with quantized keys and values.

    Returns `(out, k_cache, v_cache, k_scales, v_scales)`. Keys and values are quantized per token and head before
    any token attends to them, the new token itself included. So the output does not depend on how the tokens are
    split into calls.

    Args:
        k: the new keys [B, Hk, S, D], not quantized; `v`, the new values, [B, Hk, S, Dv].
        k_cache: codes, int8 or float8_e4m3fn [B, Hk, MAX, D]; `v_cache` [B, Hk, MAX, Dv].
        k_scales: float32 [B, Hk, MAX, 1], the scales of the codes in `k_cache`; `v_scales` alike.
        starts: as in `cached_attention`, and so are the remaining arguments.
    """
    new_k, new_k_scales = quantize_cached(k, k_cache.dtype)
    new_v, new_v_scales = quantize_cached(v, v_cache.dtype)
    pairs = (new_k, new_k_scales), (new_v, new_v_scales), (k_cache, k_scales), (v_cache, v_scales)
    k, v, k_old, v_old = (dequantize_cached(*pair).to(accumulator(q.dtype)) for pair in pairs)
    out = attend_over(
        q, k, v, k_old, v_old, starts, scale,
        window=window, chunk=chunk, softcap=softcap, sinks=sinks, slopes=slopes, ring=ring,
    )  # fmt: skip
    return (
        out,
        *(_write_codes(*pair, starts, ring) for pair in ((k_cache, new_k), (v_cache, new_v))),
        *(write(*pair, starts, ring) for pair in ((k_scales, new_k_scales), (v_scales, new_v_scales))),
    )  # type: ignore[return-value]


def _write_codes(cache: Tensor, new: Tensor, starts: Tensor, ring: bool) -> Tensor:
    """Call `write` on the bytes of the codes, because torch cannot gather float8."""
    return write(cache.view(torch.uint8), new.view(torch.uint8), starts, ring).view(cache.dtype)
