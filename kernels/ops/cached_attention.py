"""Attention over a KV cache and the new tokens, which are written to the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import attend, visible
from .op import op
from .precision import accumulator
from .quantized import dequantize_by_channel, quantize_by_channel


def _positions_of(indices: Tensor, lengths: Tensor, ring: bool) -> Tensor:
    """Return the position stored at each cache index, [B, MAX].

    `lengths` is the number of tokens of each sequence. An index whose position is outside 0..length-1 is empty.
    """
    if not ring:
        return indices.unsqueeze(0).expand(lengths.shape[0], -1)
    last = lengths.unsqueeze(1) - 1
    return last - (last - indices) % indices.shape[0]


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
    """Return the output of `cached_attention` without writing to the cache."""
    size = k_old.shape[2]
    reach = min((limit for limit in (window, chunk) if limit is not None), default=None)
    if ring and (reach is None or reach > size):
        raise ValueError(
            f"a ring cache of {size} positions requires a window or a chunk of at most {size}, "
            f"not window={window}, chunk={chunk}"
        )
    indices = torch.arange(size, device=q.device)
    new = starts.unsqueeze(1) + torch.arange(q.shape[2], device=q.device)  # [B, S]
    old = _positions_of(indices, starts, ring)  # [B, MAX]

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
    """Return a copy of the cache with the new tokens [B, Hk, S, ...] written."""
    indices = torch.arange(cache.shape[2], device=cache.device)
    # The new token that each cache index receives, [B, MAX]; outside 0..S-1: none.
    source = _positions_of(indices, starts + new.shape[2], ring) - starts.unsqueeze(1)
    written = (source >= 0) & (source < new.shape[2])
    index = torch.where(written, source, 0)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(written[:, None, :, None], new.gather(2, index), cache)


def _shapes(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object, **__: object) -> Any:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


def _stored(x: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    return x.to(dtype) if scales is None else quantize_by_channel(x, scales)


def _loaded(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x if scales is None else dequantize_by_channel(x, scales).to(accumulator(dtype))


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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of S new tokens over the cached ones and themselves.

    Returns `(out, k_cache, v_cache)`. The caches are new tensors that include the new tokens; a target may
    write in place instead.

    Without `ring`, position p is stored at index p; tokens at position MAX or beyond are not stored. With `ring`,
    it is stored at index p % MAX. A new token may then overwrite a key that an earlier token of the same call
    still sees, so attention is computed before the caches are written. If there are more than MAX new tokens,
    the last MAX are stored.

    A ring may be longer than the window. If `starts` then goes back, positions after it that an earlier call has stored
    count as those MAX before them: too old to be seen, if it goes back by at most MAX - window + 1.

    With scales, the caches hold int8 codes. All tokens, new ones too, are quantized before any token attends to them.

    Args:
        q: [B, H, S, D].
        k: the new keys [B, Hk, S, D]; `v`, the new values, [B, Hk, S, Dv].
        k_cache: [B, Hk, MAX, D]; `v_cache` [B, Hk, MAX, Dv].
        starts: [B] int64, the number of positions cached for each sequence; new token i has position starts + i.
        window: as in `attention`, and so are `chunk`, `softcap`, `sinks` and `slopes`.
        k_scales: [Hk, D], the scale of each channel of the keys; `v_scales`, of the values, [Hk, Dv].
    """
    k, v = _stored(k, k_cache.dtype, k_scales), _stored(v, v_cache.dtype, v_scales)
    new_k, old_k = (_loaded(each, k_scales, q.dtype) for each in (k, k_cache))
    new_v, old_v = (_loaded(each, v_scales, q.dtype) for each in (v, v_cache))
    out = attend_over(
        q, new_k, new_v, old_k, old_v, starts, scale,
        window=window, chunk=chunk, softcap=softcap, sinks=sinks, slopes=slopes, ring=ring,
    )  # fmt: skip
    return out, write(k_cache, k, starts, ring), write(v_cache, v, starts, ring)
