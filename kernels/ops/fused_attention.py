"""Cached attention fused with the split into heads and the rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cached_attention import cached_attention
from .op import op
from .rope import rope


def _shapes(q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    heads = rest[1]
    out = q.new_empty(*q.shape[:2], heads * v_cache.shape[3])
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


@op(fake=_shapes)
def fused_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    heads: int,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` of projections that are not split into heads.

    Returns `(out [B, S, H*Dv], k_cache, v_cache)`.

    Args:
        q: [B, S, H*D]; k [B, S, Hk*D] and v [B, S, Hk*Dv]. If k and v are None, q is all three concatenated.
        heads: the number of query heads; the other sizes are read from the caches.
        cos: [M, R/2], as is `sin`; queries and keys are rotated by `rope`. None: no rotation.
        window: as in `cached_attention`, and so are `softcap`, `sinks`, `k_scales` and `v_scales`.
    """
    kv_heads, dim, value_dim = k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    if k is None or v is None:
        q, k, v = q.split([heads * dim, kv_heads * dim, kv_heads * value_dim], -1)
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if cos is not None and sin is not None:
        positions = starts.unsqueeze(1) + torch.arange(q.shape[2], device=q.device)
        q, k = (rope.meaning(x, positions, cos, sin, interleaved) for x in (q, k))
    out, k_cache, v_cache = cached_attention.meaning(
        q, k, v, k_cache, v_cache, starts, scale,
        window=window, softcap=softcap, sinks=sinks, k_scales=k_scales, v_scales=v_scales,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2), k_cache, v_cache
