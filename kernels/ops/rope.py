"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen


@op(fake=lambda x, *_, **__: x.new_empty(x.shape))
def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of the first R dims of each head by the angles of its position; the other dims pass.

    Args:
        x: [B, H, S, D].
        positions: [B, S] int64, rows of the tables.
        cos: [M, R/2], as is `sin`.
        interleaved: pairs are (2i, 2i+1); otherwise (i, i + R/2).
    """
    half = cos.shape[-1]
    wide = widen(x)
    c = F.embedding(positions, cos).to(wide.dtype).unsqueeze(1)  # [B, 1, S, R/2]
    s = F.embedding(positions, sin).to(wide.dtype).unsqueeze(1)
    turning, passing = wide[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :half], turning[..., half:]
    turned = a * c - b * s, b * c + a * s
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined.to(x.dtype), passing), -1)
