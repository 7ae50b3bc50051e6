"""Attention without a cache.

`visible` (the mask) and `attend` (softmax and weighted sum) are shared with cached attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import op
from .precision import widen


def visible(
    queries: Tensor, keys: Tensor, causal: bool = True, window: int | None = None, chunk: int | None = None
) -> Tensor | None:
    """Return the mask [B or 1, S, T] of keys each query sees; None if it sees all.

    Args:
        queries: positions [B or 1, S, 1].
        keys: positions [B or 1, 1, T].
        window: a query sees this many positions, the last of which is its own.
        chunk: a query sees only keys of its own chunk, which has this many positions.
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
    """Weigh the values by the softmax of the scores.

    The output of a query that sees no key is zero.

    Args:
        q: [B, H, S, D]; the number of heads of k and v divides H.
        seen: [B or 1, S, T], True where the query may see the key.
        distance: key position minus query position, same shape as `seen`; required with `slopes`.
    """
    batch, heads, query_count, _ = q.shape
    kv_heads, key_count = k.shape[1], k.shape[2]
    # All queries that share a kv head are stacked into one matrix, so that k and v are never repeated.
    stacked = widen(q).reshape(batch, kv_heads, -1, q.shape[3])
    # The scores are the largest value by far, so they are changed in place.
    scores = (stacked @ widen(k).transpose(2, 3)).mul_(scale).view(batch, heads, query_count, key_count)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        assert distance is not None
        scores = scores + slopes.to(scores.dtype).view(-1, 1, 1) * distance.unsqueeze(1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if seen is not None:
        scores = scores.masked_fill_(~seen.unsqueeze(1), -torch.inf)

    # The peak cancels out, so it has no gradient.
    peak = scores.detach().amax(-1, keepdim=True)
    # The peak of a query that sees nothing is -inf, and -inf - -inf would be NaN.
    peak = peak.clamp(min=torch.finfo(peak.dtype).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        # Infinite if a sink far outweighs every key; the weights of the keys are then zero, as they should be.
        total = total + torch.exp(sinks.to(scores.dtype).view(-1, 1, 1) - peak)
    # The peak contributes exp(0) = 1, so the total is below 1 only for a query that sees nothing.
    weights = weights / total.clamp(min=1.0)
    out = weights.view(batch, kv_heads, -1, key_count) @ widen(v)
    return out.view(batch, heads, query_count, v.shape[3]).to(q.dtype)


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
    """Attention of S queries over T keys; query i has position T - S + i.

    The scores are scaled, capped, biased and masked, in this order, and then passed to the softmax.

    Args:
        q: [B, H, S, D]; k [B, Hk, T, D] and v [B, Hk, T, Dv], where Hk divides H. Returns [B, H, S, Dv].
        window: a query sees this many positions, the last of which is its own.
        chunk: a query sees only keys of its own chunk, which has this many positions.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: [H], an additional logit per head that takes part in the softmax and has no value.
        slopes: [H], adds `slope * (key - query)` to the scores (alibi).
        bias: added to the scores, broadcastable to [B, H, S, T].
    """
    query_count, key_count = q.shape[2], k.shape[2]
    keys = torch.arange(key_count, device=q.device).view(1, 1, -1)
    queries = (torch.arange(query_count, device=q.device) + (key_count - query_count)).view(1, -1, 1)
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
