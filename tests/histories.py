"""A float64 reference of cached attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

H, HK, D, DV = 4, 2, 6, 3
SCALE = 0.4
GARBAGE = 1e3  # the value of cache entries to which no token was written


class History:
    """All tokens of two sequences; computes caches and attention with plain loops."""

    def __init__(self, size: int, ring: bool, dtype: torch.dtype = torch.float64, longest: int = 40) -> None:
        self.size, self.ring = size, ring
        self.q = torch.randn(2, H, longest, D).to(dtype)
        self.k = torch.randn(2, HK, longest, D).to(dtype)
        self.v = torch.randn(2, HK, longest, DV).to(dtype)

    def cache(self, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """Return the cache after the first `lengths` tokens of each sequence."""
        cache = torch.full((*tokens.shape[:2], self.size, tokens.shape[3]), GARBAGE, dtype=tokens.dtype)
        for b, length in enumerate(lengths):
            for position in range(length):
                if self.ring:
                    cache[b, :, position % self.size] = tokens[b, :, position]
                elif position < self.size:
                    cache[b, :, position] = tokens[b, :, position]
        return cache

    def arguments(self, starts: list[int], count: int) -> tuple[torch.Tensor, ...]:
        def new(tokens: torch.Tensor) -> torch.Tensor:
            pairs = zip(tokens, starts, strict=True)
            return torch.stack([sequence[:, start : start + count] for sequence, start in pairs])

        caches = self.cache(starts, self.k), self.cache(starts, self.v)
        return new(self.q), new(self.k), new(self.v), *caches, torch.tensor(starts)

    def exact(self, starts: list[int], count: int, extra: dict[str, Any]) -> tuple[Any, ...]:
        out = np.zeros((2, H, count, DV))
        for b, h, i in np.ndindex(2, H, count):
            out[b, h, i] = self._attend(b, h, starts[b] + i, **extra)
        ends = [start + count for start in starts]
        return out, self.cache(ends, self.k), self.cache(ends, self.v)

    def _attend(self, b, h, query, window=None, chunk=None, softcap=None, sinks=None, slopes=None) -> np.ndarray:
        total, out = 0.0 if sinks is None else math.exp(sinks[h]), np.zeros(DV)
        for j in range(query + 1):
            if (window is not None and query - j >= window) or (chunk is not None and j // chunk != query // chunk):
                continue
            score = SCALE * float(self.q[b, h, query].double() @ self.k[b, h // 2, j].double())
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            if slopes is not None:
                score += float(slopes[h]) * (j - query)
            total += math.exp(score)
            out += math.exp(score) * self.v[b, h // 2, j].double().numpy()
        return out / total
