"""Attention over what a cache holds and the new tokens, which enter the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import attend, visible
from .op import op


def _held(lengths: Tensor, slots: Tensor, ring: bool) -> Tensor:
    """The position that each slot holds in a row of so many tokens, [B, MAX]; outside 0..length-1 it holds none."""
    if not ring:
        return slots.unsqueeze(0).expand(lengths.shape[0], -1)
    last = lengths.unsqueeze(1) - 1
    return last - (last - slots) % slots.shape[0]


def attend_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_old: Tensor,
    v_old: Tensor,
    starts: Tensor,
    scale: float,
    *,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    ring: bool,
) -> Tensor:
    """What `cached_attention` gives for new tokens beside those that slots hold; nothing is written."""
    size = k_old.shape[2]
    reach = min((limit for limit in (window, chunk) if limit is not None), default=None)
    if ring and (reach is None or reach > size):
        raise ValueError(f"a ring of {size} slots can't serve window={window}, chunk={chunk}")
    slots = torch.arange(size, device=q.device)
    new = starts.unsqueeze(1) + torch.arange(q.shape[2], device=q.device)  # [B, S]
    old = _held(starts, slots, ring)  # [B, MAX]

    keys = torch.cat((old, new), 1).unsqueeze(1)  # [B, 1, MAX + S]
    queries = new.unsqueeze(2)
    filled = torch.cat(((old >= 0) & (old < starts.unsqueeze(1)), torch.ones_like(new, dtype=torch.bool)), 1)
    seen = visible(queries, keys, window=window, chunk=chunk)
    assert seen is not None
    return attend(
        q,
        torch.cat((k_old, k), 2),
        torch.cat((v_old, v), 2),
        scale=scale,
        seen=seen & filled.unsqueeze(1),
        distance=keys - queries,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
    )


def write(cache: Tensor, new: Tensor, starts: Tensor, ring: bool) -> Tensor:
    """The cache with new tokens [B, Hk, S, ...] in their slots; those that get none keep what they held."""
    slots = torch.arange(cache.shape[2], device=cache.device)
    source = _held(starts + new.shape[2], slots, ring) - starts.unsqueeze(1)  # which new token a slot takes, [B, MAX]
    takes = (source >= 0) & (source < new.shape[2])
    index = torch.where(takes, source, 0)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(takes[:, None, :, None], new.gather(2, index), cache)


def _shapes(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object, **__: object) -> Any:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


@op(fake=_shapes)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    ring: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of S new tokens over the cached ones and themselves: `(out, k_cache, v_cache)`.

    The caches come back as new tensors with the new tokens written; a backend writes in place instead.
    Without `ring` position p lies in slot p, and a token at MAX or beyond is not kept. With `ring` it lies
    in slot p % MAX: new tokens may overwrite what earlier ones of the same call still see, so the meaning
    attends first and writes then. Of more than MAX new tokens the last MAX are kept.

    Args:
        q: [B, H, S, D].
        k: the new keys [B, Hk, S, D]; `v`, the new values, [B, Hk, S, Dv].
        k_cache: [B, Hk, MAX, D]; `v_cache` [B, Hk, MAX, Dv].
        starts: [B] int64, how many positions each row holds; new token i is position starts + i.
        window: as in `attention`, and so are `chunk`, `softcap`, `sinks` and `slopes`.
    """
    k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
    out = attend_over(
        q, k, v, k_cache, v_cache, starts, scale,
        window=window, chunk=chunk, softcap=softcap, sinks=sinks, slopes=slopes, ring=ring,
    )  # fmt: skip
    return out, write(k_cache, k, starts, ring), write(v_cache, v, starts, ring)
