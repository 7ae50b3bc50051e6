"""The activation functions of the dialect in ONNX."""

from __future__ import annotations

from typing import Any

import torch

from .graph import Value
from .lower import Lowering


def activation(g: Lowering, x: Any, act: str, alpha: float = 1.0, dtype: torch.dtype = torch.float32) -> str:
    """Write one of the activations of `gated_act` for a value of `dtype`."""
    if act == "silu":
        scaled = x if alpha == 1.0 else g.op("Mul", x, g.constant(alpha, dtype))
        return g.op("Mul", x, g.op("Sigmoid", scaled))
    if act == "relu2":
        positive = g.op("Relu", x)
        return g.op("Mul", positive, positive)
    if act in ("gelu", "gelu_tanh"):
        return g.op("Gelu", x, approximate="tanh" if act == "gelu_tanh" else "none")
    return g.op({"relu": "Relu", "sigmoid": "Sigmoid"}[act], x)


def gate_by(
    g: Lowering, gate: Any, up: Any, act: str, alpha: float, limit: float | None, offset: float, dtype: torch.dtype
) -> str:
    """Write `gated_act` for values of `dtype`."""
    if limit is not None:
        gate = g.op("Min", gate, g.constant(limit, dtype))
        up = g.op("Clip", up, g.constant(-limit, dtype), g.constant(limit, dtype))
    if offset:
        up = g.op("Add", up, g.constant(offset, dtype))
    return g.op("Mul", activation(g, gate, act, alpha, dtype), up)


def gated_act(g: Lowering, gate: Value, up: Value, act: str, alpha: float, limit: float | None, offset: float) -> str:
    return gate_by(g, gate, up, act, alpha, limit, offset, gate.dtype)
