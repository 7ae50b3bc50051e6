"""What a mask of attention says, as the attention op says it, found by looking at which keys are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import visible


@dataclass(frozen=True)
class MaskRule:
    """Which keys a query sees, as the attention op says it."""

    causal: bool
    window: int | None = None
    chunk: int | None = None

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[S, T] for positions [S] and [T]: True where the query sees the key."""
        seen = visible(queries[:, None], keys[None], self.causal, self.window, self.chunk)
        return torch.ones(len(queries), len(keys), dtype=torch.bool) if seen is None else seen


def likely_rule(row: Callable[[int], Tensor], length: int) -> MaskRule:
    """The one rule that a mask may follow; whether it does is for the caller to check.

    Args:
        row: which of `length` keys a query sees.
        length: how many queries and keys there are.
    """

    def first_key(query: int) -> int:
        return int(row(query).int().argmax())

    last = length - 1
    causal = not bool(row(0)[1:].any())
    if first_key(last) == 0:
        return MaskRule(causal)
    # The first query that doesn't see key 0 sees all from 1 if there is a window; if there are chunks it starts one.
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if first_key(middle) > 0 else (middle, high)
    # Of one position, a window and a chunk are the same.
    return MaskRule(causal, window=high) if first_key(high) == 1 else MaskRule(causal, chunk=high)


def fit_rule(seen: Tensor) -> MaskRule | None:
    """The rule that a mask [S, S] follows to the letter, if there is one."""
    rule = likely_rule(lambda query: seen[query], len(seen))
    return rule if torch.equal(rule.sees(*[torch.arange(len(seen))] * 2), seen) else None


def fit_slopes(bias: Tensor, seen: Tensor) -> Tensor:
    """The slopes [H] that a bias would have if it were alibi; whether it is, `is_alibi` says.

    Args:
        bias: [H, S or 1, S or 1]
        seen: which keys a query sees, [S, S].
    """
    row = bias[:, -1].expand(-1, len(seen)).float()
    pairs = seen[-1, 1:] & seen[-1, :-1]
    if not bool(pairs.any()):
        return torch.zeros(len(bias))
    # The step between the two neighbours whose values are smallest, hence least rounded.
    size = torch.maximum(row[:, 1:].abs(), row[:, :-1].abs()).masked_fill(~pairs, torch.inf)
    return row.diff().gather(1, size.argmin(1, keepdim=True)).squeeze(1)


def is_alibi(bias: Tensor, seen: Tensor, slopes: Tensor, eps: float) -> bool:
    """Whether a bias is `slope * (key - query)` where a key is seen, up to a term that is the same for a query's keys.

    Such a term doesn't pass the softmax, so that `slope * key` is alibi too.

    Args:
        bias, seen: as for `fit_slopes`; every query sees itself.
        eps: the precision that the bias was computed in; a difference within its rounding is none.
    """
    positions = torch.arange(len(seen))
    distance = (positions - positions[:, None]).float()
    for head, slope in zip(bias.float(), slopes, strict=True):
        head = head.expand(len(seen), -1).expand(-1, len(seen))
        own = head.diagonal()[:, None]
        off = head - own - slope * distance
        if not bool((off.abs() <= 2 * eps * (head.abs() + own.abs()))[seen].all()):
            return False
    return True
