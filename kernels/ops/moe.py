"""A block of experts, of which each token visits a few."""

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
    """The sum of the experts that `ids` names, weighted; computed wide and rounded once.

    Args:
        x: [T, H].
        ids: [T, K] int64; one outside 0..E-1 names no expert.
        weights: [T, K].
        w_in: [E, 2I, H], first the I rows of the gate, then those of `up`; not gated: [E, I, H].
        w_out: [E, H, I].
        b_in: [E, 2I] or [E, I]; `b_out` [E, H].
        act: as in `gated_act`, and so are `alpha`, `limit` and `offset`; the last two need a gate.
    """
    if not gated and (limit is not None or offset != 0.0):
        raise ValueError(f"limit={limit} and offset={offset} belong to gated experts")
    wide = widen(x)
    out = torch.zeros_like(wide)
    for expert in range(w_in.shape[0]):
        token, visit = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        hidden = _linear(wide[token], w_in[expert], None if b_in is None else b_in[expert])
        if gated:
            gate, up = hidden.chunk(2, -1)
            hidden = gate_by(gate, up, act, alpha, limit, offset)
        else:
            hidden = activate(hidden, act, alpha)
        y = _linear(hidden, w_out[expert], None if b_out is None else b_out[expert])
        out.index_add_(0, token, weights[token, visit].to(y.dtype).unsqueeze(1) * y)
    return out.to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
