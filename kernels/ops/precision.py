"""The precision rule: ops compute in the accumulator dtype and round once."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """Convert `x` to its accumulator dtype."""
    return x.to(accumulator(x.dtype))
