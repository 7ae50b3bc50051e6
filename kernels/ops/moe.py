"""Mixture of experts: each token is processed by a few experts of a block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .gated_act import activate, gate_by
from .op import op
from .precision import widen


@op(fake=lambda x, *_, **__: torch.empty_like(x))
def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    act: str,
    gated: bool = True,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """The weighted sum of the selected experts' outputs for each token.

    Computed in the accumulator dtype and rounded once.

    Args:
        x: [T, H].
        ids: [T, K] int64, the selected experts; ids outside 0..E-1 select none.
        weights: [T, K], the weights of the selected experts.
        w_in: [E, 2I, H], the I output channels of the gate followed by those of `up`; if not gated, [E, I, H].
        w_out: [E, H, I].
        b_in: [E, 2I] or [E, I]; `b_out` [E, H].
        act: as in `gated_act`, and so are `alpha`, `limit` and `offset`; the last two require `gated`.
    """
    if not gated and (limit is not None or offset != 0.0):
        raise ValueError(
            f"limit={limit}, offset={offset} are given for experts without a gate; set gated, or leave them out"
        )
    wide = widen(x)
    out = torch.zeros_like(wide)
    for expert in range(w_in.shape[0]):
        token, choice = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        hidden = _linear(wide[token], w_in[expert], None if b_in is None else b_in[expert])
        if gated:
            gate, up = hidden.chunk(2, -1)
            hidden = gate_by(gate, up, act, alpha, limit, offset)
        else:
            hidden = activate(hidden, act, alpha)
        y = _linear(hidden, w_out[expert], None if b_out is None else b_out[expert])
        out.index_add_(0, token, weights[token, choice].to(y.dtype).unsqueeze(1) * y)
    return out.to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
