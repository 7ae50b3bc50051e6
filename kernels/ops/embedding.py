"""Reading rows: of a table by token, of a batch by length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op


@op
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows of `weight` [V, H] that `ids` names: [..., H]."""
    return F.embedding(ids, weight)


@op
def take_last(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The last row of each sequence: x [B, S, ...] -> [B, 1, ...].

    Args:
        lengths: [B] int64, row b ends at lengths[b] - 1; without it all are S long.
    """
    if lengths is None:
        return x.narrow(1, x.shape[1] - 1, 1).clone(memory_format=torch.contiguous_format)
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1].unsqueeze(1)
