"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen


@op(fake=lambda x, *_, **__: x.new_empty(x.shape))
def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of the first R channels of each head by the token's angles.

    The other channels are unchanged.

    Args:
        x: [B, H, S, D].
        positions: [B, S] int64, indices into the tables.
        cos: [M, R/2], cosines of the angles by position; `sin` alike.
        interleaved: True: pairs are channels (2i, 2i+1); False: (i, i + R/2).
    """
    half = cos.shape[-1]
    wide = widen(x)
    c = F.embedding(positions, cos).to(wide.dtype).unsqueeze(1)  # [B, 1, S, R/2]
    s = F.embedding(positions, sin).to(wide.dtype).unsqueeze(1)
    to_rotate, unchanged = wide[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = to_rotate[..., 0::2], to_rotate[..., 1::2]
    else:
        a, b = to_rotate[..., :half], to_rotate[..., half:]
    rotated = a * c - b * s, b * c + a * s
    joined = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return torch.cat((joined.to(x.dtype), unchanged), -1)
