"""The one rule of precision of the dialect: compute wide, round once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """`x` in its accumulator."""
    return x.to(accumulator(x.dtype))
