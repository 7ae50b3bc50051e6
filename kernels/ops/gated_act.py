"""Activations, and the gated unit built from them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")


def activate(x: Tensor, act: str, alpha: float = 1.0) -> Tensor:
    """Apply the activation of that name; `alpha` is the slope of silu's sigmoid."""
    if alpha != 1.0 and act != "silu":
        raise ValueError(f"alpha={alpha} belongs to silu, not to {act}")
    if act == "silu":
        return x * torch.sigmoid(alpha * x)
    if act == "gelu":
        return F.gelu(x)
    if act == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if act == "relu":
        return torch.relu(x)
    if act == "relu2":
        return torch.relu(x).square()
    if act == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"act {act!r} is not one of {', '.join(ACTS)}")


def gate_by(gate: Tensor, up: Tensor, act: str, alpha: float, limit: float | None, offset: float) -> Tensor:
    """`gated_act` in the dtype of its arguments."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return activate(gate, act, alpha) * (up + offset)


@op(fake=lambda gate, *_, **__: torch.empty_like(gate))
def gated_act(
    gate: Tensor, up: Tensor, act: str, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0
) -> Tensor:
    """`act(gate) * (up + offset)`, computed wide and rounded once.

    Args:
        act: "silu", "gelu", "gelu_tanh", "relu", "relu2" (its square) or "sigmoid".
        alpha: silu is `g * sigmoid(alpha * g)`.
        limit: the gate is cut off above it, `up` on both sides.
    """
    return gate_by(widen(gate), widen(up), act, alpha, limit, offset).to(gate.dtype)
