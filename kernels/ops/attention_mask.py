"""Express an attention mask as attributes of the attention op.

The rule (causal, window, chunk, alibi slopes) is inferred from the values of the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import visible


@dataclass(frozen=True)
class MaskRule:
    """The keys that a query sees, as attributes of the attention op."""

    causal: bool
    window: int | None = None
    chunk: int | None = None

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return [S, T] for positions [S] and [T]: True where the query sees the key."""
        seen = visible(queries[:, None], keys[None], self.causal, self.window, self.chunk)
        return torch.ones(len(queries), len(keys), dtype=torch.bool) if seen is None else seen


def likely_rule(mask_of: Callable[[int], Tensor], length: int) -> MaskRule:
    """Return the only rule that the mask can follow; the caller must check it.

    Args:
        mask_of: maps a query to the mask [length] of the keys that it sees.
        length: the number of queries and of keys.
    """

    def first_key(query: int) -> int:
        return int(mask_of(query).int().argmax())

    last = length - 1
    causal = not bool(mask_of(0)[1:].any())
    if first_key(last) == 0:
        return MaskRule(causal)
    # Find the first query that doesn't see key 0. With a window, the first key it sees is 1; with chunks, itself.
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if first_key(middle) > 0 else (middle, high)
    # A window of one position equals a chunk of one position; it is reported as a window.
    return MaskRule(causal, window=high) if first_key(high) == 1 else MaskRule(causal, chunk=high)


def fit_rule(seen: Tensor) -> MaskRule | None:
    """Return the rule that a mask [S, S] follows exactly, or None."""
    rule = likely_rule(lambda query: seen[query], len(seen))
    return rule if torch.equal(rule.sees(*[torch.arange(len(seen))] * 2), seen) else None


def fit_slopes(bias: Tensor, seen: Tensor) -> Tensor:
    """Return the slopes [H] that the bias has if it is alibi; `is_alibi` checks that.

    Args:
        bias: [H, S or 1, S or 1]
        seen: [S, S], True where the query sees the key.
    """
    last_query = bias[:, -1].expand(-1, len(seen)).float()
    both_seen = seen[-1, 1:] & seen[-1, :-1]
    if not bool(both_seen.any()):
        return torch.zeros(len(bias))
    # Use the difference of the two neighbours with the smallest values: they have the smallest rounding error.
    size = torch.maximum(last_query[:, 1:].abs(), last_query[:, :-1].abs()).masked_fill(~both_seen, torch.inf)
    return last_query.diff().gather(1, size.argmin(1, keepdim=True)).squeeze(1)


def is_alibi(bias: Tensor, seen: Tensor, slopes: Tensor, eps: float) -> bool:
    """Return True if the bias of all seen keys is alibi: `slope * (key - query)`.

    A term that is the same for all keys of a query is ignored, because the softmax cancels it. So `slope * key`
    is alibi too.

    Args:
        bias, seen: as for `fit_slopes`; every query must see itself.
        eps: the precision that the bias was computed in. Differences within its rounding error are ignored.
    """
    positions = torch.arange(len(seen))
    distance = (positions - positions[:, None]).float()
    for head, slope in zip(bias.float(), slopes, strict=True):
        head = head.expand(len(seen), -1).expand(-1, len(seen))
        own = head.diagonal()[:, None]
        error = head - own - slope * distance
        if not bool((error.abs() <= 2 * eps * (head.abs() + own.abs()))[seen].all()):
            return False
    return True
