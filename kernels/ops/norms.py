"""Normalization over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import op
from .precision import widen


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = widen(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype)


@op(fake=lambda x, *_, **__: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide by the root mean square and multiply by the weight; round once."""
    return _rms_norm(x, weight, eps)


@op(fake=lambda x, *_, **__: torch.empty_like(x))
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Subtract the mean, divide by the deviation, scale and shift; round once."""
    wide = widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


@op(fake=lambda x, *_, **__: (torch.empty_like(x), torch.empty_like(x)))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(y, s)` with `s = x + residual` and `y = rms_norm(s)`.

    The norm is computed from `s` after rounding to x's dtype.
    """
    s = x + residual
    return _rms_norm(s, weight, eps), s
