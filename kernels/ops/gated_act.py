"""Activation functions and the gated unit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")


def activate(x: Tensor, act: str, alpha: float = 1.0) -> Tensor:
    """Apply the activation named `act`; silu is `x * sigmoid(alpha * x)`."""
    if alpha != 1.0 and act != "silu":
        raise ValueError(f"alpha={alpha} is given for {act}, but only silu has alpha; leave it at 1.0")
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
    """Compute `gated_act` in the dtype of the arguments."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return activate(gate, act, alpha) * (up + offset)


@op(fake=lambda gate, *_, **__: torch.empty_like(gate))
def gated_act(
    gate: Tensor, up: Tensor, act: str, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0
) -> Tensor:
    """`act(gate) * (up + offset)`, computed in the accumulator dtype, rounded once.

    Args:
        act: "silu", "gelu", "gelu_tanh", "relu", "relu2" (the square of relu) or "sigmoid".
        alpha: silu is `g * sigmoid(alpha * g)`.
        limit: clamps the gate to at most `limit`, and `up` to -limit..limit.
    """
    return gate_by(widen(gate), widen(up), act, alpha, limit, offset).to(gate.dtype)
