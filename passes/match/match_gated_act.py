"""Replace gated units by the `gated_act` op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ...ir.program import Miss, Program, op_name
from ...kernels.ops import gated_act
from ..base import Rewrite, miss
from ..queries import (
    arguments,
    behind_casts,
    behind_widening,
    dtype,
    is_call,
    number,
    operands,
    rounded_to,
    same_shape,
)
from .match_activation import MatchActivation


class MatchGatedAct(Rewrite):
    """Replace the product of an activated gate and a tensor of its shape by one op.

    Example:  y = mul(silu(gate), up)
         or:  g = clamp(gate, max=7);  u = clamp(up, -7, 7);  y = mul(add(u, 1), mul(g, sigmoid(mul(g, 1.702))))
    Becomes:  y = gated_act(gate, up, "silu")
         or:  y = gated_act(gate, up, "silu", 1.702, 7.0, 1.0)

    Activations are silu, gelu, relu, relu squared and sigmoid. An attention output times the sigmoid of a gate is a
    gated unit too. Clamps that the op cannot express stay before it.

    Left alone: 1. an activation that is a product itself, such as `x * sigmoid(x)` or `relu(x) * relu(x)`; 2. a product
    that broadcasts, as with one score per token; 3. a factor that is a weight; 4. a gate times its own activation;
    5. an activation that is clamped afterwards; 6. a result whose dtype differs from that of gate and up.
    """

    after = (MatchActivation,)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_call(node, "mul") or _activation(node) is not None:
            return None
        sides = [(act, up) for gated, up in operands(node) if isinstance(up, fx.Node) and (act := _activation(gated))]
        if not sides:
            return _near_miss(node)
        # If both factors are activated, the activation that comes first in _PREFERENCE marks the gate.
        act, up = min(sides, key=lambda side: _PREFERENCE.index(side[0].name))
        if not (same_shape(act.gate, up) and same_shape(up, node)):
            return miss("the product broadcasts", node)
        if any(behind_casts(side).op == "get_attr" for side in (act.gate, up)):
            return miss("a factor is a weight", node)
        if behind_casts(act.gate) is behind_casts(up):
            return miss("the gate is multiplied by itself", node)
        return _replace(program, node, act, up)


_PREFERENCE = ("silu", "gelu", "gelu_tanh", "relu2", "relu", "sigmoid")


@dataclass(frozen=True)
class _Activation:
    name: str
    gate: fx.Node
    alpha: float = 1.0


def _activation(node: Any) -> _Activation | None:
    """The activation of the dialect that `node` computes, or None."""
    node = behind_casts(node)
    if is_call(node, "silu", "relu", "sigmoid"):
        return _Activation(op_name(node).removeprefix("aten."), arguments(node)["self"])
    if is_call(node, "gelu"):
        values = arguments(node)
        return _Activation("gelu_tanh" if values["approximate"] == "tanh" else "gelu", values["self"])
    if is_call(node, "square") or (is_call(node, "pow") and number(node.args[1]) == 2):
        return _squared_relu(node.args[0])
    if is_call(node, "mul"):
        if node.args[0] is node.args[1]:
            return _squared_relu(node.args[0])
        for x, squashed in operands(node):
            if is_call(squashed := behind_casts(squashed), "sigmoid") and (alpha := _multiple(squashed.args[0], x)):
                return _Activation("silu", x, alpha)
    return None


def _squared_relu(node: Any) -> _Activation | None:
    node = behind_casts(node)
    return _Activation("relu2", arguments(node)["self"]) if is_call(node, "relu") else None


def _multiple(node: Any, x: fx.Node) -> float | None:
    """The number alpha if `node` is alpha * x, otherwise None."""
    if node is x:
        return 1.0
    if is_call(node, "mul"):
        return next((number(factor) for value, factor in operands(node) if value is x), None)
    return None


def _near_miss(node: fx.Node) -> Miss | None:
    for gated, up in operands(node):
        if is_call(gated, "clamp", "clamp_max", "clamp_min") and isinstance(up, fx.Node) and _activation(gated.args[0]):
            return miss("the clamp comes after the activation, not before it", gated)
    return None


def _replace(program: Program, node: fx.Node, act: _Activation, up: fx.Node) -> bool | Miss:
    up, offset = _without_offset(up)
    gate, up, limit = _without_clamps(act.gate, up)
    for g in (behind_widening(gate), gate):
        for u in (behind_widening(up), up):
            if dtype(g) == dtype(u) and (end := rounded_to(node, dtype(g))):
                program.replace_with(end, gated_act, g, u, act.name, act.alpha, limit, offset)
                return True
    return miss(f"the gate is {dtype(gate)} and up is {dtype(up)}, but their product is {dtype(node)}", node)


def _without_offset(up: fx.Node) -> tuple[fx.Node, float]:
    """Split `x + number` into (x, number); (up, 0) if it is no such sum."""
    total = behind_widening(up)
    if is_call(total, "add") and not total.kwargs:
        for value, other in operands(total):
            if isinstance(value, fx.Node) and (offset := number(other)) is not None:
                return value, offset
    return up, 0.0


def _without_clamps(gate: fx.Node, up: fx.Node) -> tuple[fx.Node, fx.Node, float | None]:
    """Gate and up before they are clamped, and the limit.

    The clamps must be `gate <= limit` and `-limit <= up <= limit`. Otherwise returns gate and up unchanged, and None.
    """
    inner_gate, gate_low, gate_high = _clamp(gate)
    inner_up, up_low, up_high = _clamp(up)
    if gate_high is None or gate_low is not None or up_high != gate_high or up_low != -gate_high:
        return gate, up, None
    return inner_gate, inner_up, gate_high


def _clamp(node: fx.Node) -> tuple[fx.Node, float | None, float | None]:
    """Split a clamp into input and bounds; (node, None, None) if it is no clamp."""
    clamped = behind_widening(node)
    if is_call(clamped, "clamp", "clamp_max", "clamp_min"):
        values = arguments(clamped)
        return values["self"], number(values.get("min")), number(values.get("max"))
    return node, None, None
