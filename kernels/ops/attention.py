"""Attention without a cache, and the two halves that cached attention shares: who sees whom, and the softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import op
from .precision import widen


def visible(
    queries: Tensor, keys: Tensor, causal: bool = True, window: int | None = None, chunk: int | None = None
) -> Tensor | None:
    """Which keys a query may see, or None where it may see all.

    Args:
        queries: positions [B or 1, S, 1].
        keys: positions [B or 1, 1, T].
        window: a query sees this many positions up to its own.
        chunk: a query sees only keys of its own block of this many positions.
    """
    rules = []
    if causal:
        rules.append(keys <= queries)
    if window is not None:
        rules.append(keys > queries - window)
    if chunk is not None:
        rules.append(keys // chunk == queries // chunk)
    if not rules:
        return None
    seen = rules[0]
    for rule in rules[1:]:
        seen = seen & rule
    return seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    seen: Tensor | None,
    distance: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Weigh the values by the softmax of the scores; a row that sees no key gives zeros.

    Args:
        q: [B, H, S, D]; k and v have H or a divisor of H heads.
        seen: [B or 1, S, T], True where the query may see the key.
        distance: key position minus query position, like `seen`; read by `slopes`.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    # The query heads of one kv head are stacked as rows, so that k and v are never repeated.
    stacked = widen(q).reshape(batch, kv_heads, -1, q.shape[3])
    scores = scale * (stacked @ widen(k).transpose(2, 3)).view(batch, heads, rows, columns)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        assert distance is not None
        scores = scores + slopes.to(scores.dtype).view(-1, 1, 1) * distance.unsqueeze(1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if seen is not None:
        scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)

    peak = scores.amax(-1, keepdim=True)
    # A row that sees nothing has a peak of -inf, and -inf - -inf would be NaN.
    peak = peak.clamp(min=torch.finfo(peak.dtype).min)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        # Infinite where a sink outweighs every key, whose weights are then rightly zero.
        total = total + torch.exp(sinks.to(scores.dtype).view(-1, 1, 1) - peak)
    # The peak itself counts one, so only a row that sees nothing is below it.
    weights = weights / total.clamp(min=1.0)
    out = weights.view(batch, kv_heads, -1, columns) @ widen(v)
    return out.view(batch, heads, rows, v.shape[3]).to(q.dtype)


@op(fake=lambda q, k, v, *_, **__: q.new_empty(*q.shape[:3], v.shape[3]))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention over keys of which the last S belong to the queries: query i stands at position T - S + i.

    The scores are scaled, capped, biased, masked and put through the softmax, in this order.

    Args:
        q: [B, H, S, D]; k [B, Hk, T, D] and v [B, Hk, T, Dv], where Hk divides H. Returns [B, H, S, Dv].
        window: a query sees this many keys up to its own.
        chunk: a query sees only keys of its own block of this many positions.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: [H], a logit per head that takes part in the softmax and has no value.
        slopes: [H], adds `slope * (key - query)` (alibi).
        bias: added to the scores, broadcastable to [B, H, S, T].
    """
    rows, columns = q.shape[2], k.shape[2]
    keys = torch.arange(columns, device=q.device).view(1, 1, -1)
    queries = (torch.arange(rows, device=q.device) + (columns - rows)).view(1, -1, 1)
    return attend(
        q,
        k,
        v,
        scale=scale,
        seen=visible(queries, keys, causal, window, chunk),
        distance=keys - queries,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
        bias=bias,
    )
