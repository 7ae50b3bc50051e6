"""Every spelling of a gated unit becomes one op; other products do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_pass import VOCAB, check_pass
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation, QuickGELUActivation, ReLUSquaredActivation

from llmc.ir.program import Program
from llmc.passes.match.match_activation import MatchActivation
from llmc.passes.match.match_gated_act import MatchGatedAct
from llmc.passes.queries import dtype

WIDTH = 12
Unit = Callable[[Tensor, Tensor, Tensor], Tensor]


class Gated(nn.Module):
    """`unit(gate, up, weight)` on two projections [B, S, 12] and a parameter [12]."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.unit = unit

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.unit(2 * self.gate(x), 2 * self.up(x), self.weight)
        y = y if y.dim() == 3 else x + y
        return self.head(F.pad(y.float(), (0, WIDTH - y.shape[-1])))


def gpt_oss(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    g = g.clamp(min=None, max=1.5)
    u = u.clamp(min=-1.5, max=1.5)
    return (u + 1) * (g * torch.sigmoid(g * 1.702))


def interleaved(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    both = torch.cat([g, u], -1)
    return gpt_oss(both[..., ::2], both[..., 1::2], w)


def one_projection(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    u, g = torch.cat([u, g], -1).chunk(2, dim=-1)
    return u * F.silu(g)


Arguments = tuple[str, float, float | None, float]

# Name: (unit, expected activation, alpha, limit and offset of the op).
UNITS: dict[str, tuple[Unit, Arguments]] = {
    "silu": (lambda g, u, w: F.silu(g) * u, ("silu", 1.0, None, 0.0)),
    "commuted": (lambda g, u, w: u * F.silu(g), ("silu", 1.0, None, 0.0)),
    "one projection": (one_projection, ("silu", 1.0, None, 0.0)),
    "gelu": (lambda g, u, w: F.gelu(g) * u, ("gelu", 1.0, None, 0.0)),
    "gelu tanh": (lambda g, u, w: F.gelu(g, approximate="tanh") * u, ("gelu_tanh", 1.0, None, 0.0)),
    "quick gelu": (lambda g, u, w: QuickGELUActivation()(g) * u, ("silu", 1.702, None, 0.0)),
    "relu": (lambda g, u, w: F.relu(g) * u, ("relu", 1.0, None, 0.0)),
    "relu squared": (lambda g, u, w: ReLUSquaredActivation()(g) * u, ("relu2", 1.0, None, 0.0)),
    "relu to the second": (lambda g, u, w: F.relu(g) ** 2 * u, ("relu2", 1.0, None, 0.0)),
    "relu by itself": (lambda g, u, w: u * ((r := F.relu(g)) * r), ("relu2", 1.0, None, 0.0)),
    "attention gate": (lambda g, u, w: u * torch.sigmoid(g), ("sigmoid", 1.0, None, 0.0)),
    "gpt_oss": (gpt_oss, ("silu", 1.702, 1.5, 1.0)),
    "interleaved": (interleaved, ("silu", 1.702, 1.5, 1.0)),
    "deepseek_v4": (lambda g, u, w: F.silu(g.clamp(max=1.0)) * u.clamp(-1.0, 1.0), ("silu", 1.0, 1.0, 0.0)),
    "gate clamped alone": (lambda g, u, w: F.silu(g.clamp(max=1.0)) * u, ("silu", 1.0, None, 0.0)),
    "gate clamped on both sides": (lambda g, u, w: F.silu(g.clamp(-1, 1)) * u.clamp(-1, 1), ("silu", 1.0, None, 0.0)),
    "up clamped elsewhere": (lambda g, u, w: F.silu(g.clamp(max=1)) * u.clamp(-1, 2), ("silu", 1.0, None, 0.0)),
    "up clamped on one side": (lambda g, u, w: F.silu(g.clamp(max=1)) * u.clamp(max=1), ("silu", 1.0, None, 0.0)),
    "shifted, then clamped": (lambda g, u, w: F.silu(g.clamp(max=1)) * (u + 1).clamp(-1, 1), ("silu", 1.0, 1.0, 0.0)),
    "shifted by a weight": (lambda g, u, w: F.silu(g) * (u + w), ("silu", 1.0, None, 0.0)),
    "shifted by a scaled number": (lambda g, u, w: F.silu(g) * torch.add(u, 1, alpha=2), ("silu", 1.0, None, 0.0)),
    "two activations": (lambda g, u, w: torch.sigmoid(u) * F.silu(g), ("silu", 1.0, None, 0.0)),
    "sigmoid of a multiple": (lambda g, u, w: u * torch.sigmoid(2 * g), ("sigmoid", 1.0, None, 0.0)),
}


def op_arguments(program: Program) -> dict[str, Any]:
    (node,) = [n for n in program.nodes if "gated_act" in str(n.target)]
    return dict(zip(("gate", "up", "act", "alpha", "limit", "offset"), node.args, strict=True))


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_becomes_the_op(unit: str) -> None:
    module, expected = UNITS[unit]
    program = check_pass(MatchGatedAct(), Gated(module), matches=1, there={"llmc.gated_act"})
    values = op_arguments(program)
    assert tuple(values[name] for name in ("act", "alpha", "limit", "offset")) == expected
    assert bool(program.ops()["aten.clamp"]) == ("clamped" in unit and expected[2] is None)


def test_a_spelled_out_activation_is_matched_first() -> None:
    module = Gated(lambda g, u, w: u * NewGELUActivation()(g))
    program = check_pass(MatchGatedAct(), module, matches=1, gone={"aten.tanh"}, first=[MatchActivation()])
    assert op_arguments(program)["act"] == "gelu_tanh"
    assert MatchActivation in MatchGatedAct.after


# The op rounds once and the models round twice, hence the tolerance.
def test_casts_around_a_half_precision_unit_are_removed() -> None:
    def unit(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
        g, u = g.to(torch.bfloat16), u.to(torch.bfloat16)
        return (u * F.silu(g.to(torch.float32))).to(torch.bfloat16)

    program = check_pass(MatchGatedAct(), Gated(unit), matches=1, atol=0.04)
    assert dtype(op_arguments(program)["gate"]) == dtype(op_arguments(program)["up"]) == torch.bfloat16


def test_a_wide_unit_keeps_its_wide_inputs() -> None:
    def unit(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return F.silu(g.to(torch.bfloat16).float()) * u

    program = check_pass(MatchGatedAct(), Gated(unit), matches=1)
    assert dtype(op_arguments(program)["gate"]) == dtype(op_arguments(program)["up"]) == torch.float32


def mixed(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    return F.silu(g.to(torch.bfloat16)) * u


LEFT: dict[str, tuple[Unit, str]] = {
    "1. silu": (lambda g, u, w: g * torch.sigmoid(g), ""),
    "1. quick gelu": (lambda g, u, w: g * torch.sigmoid(1.702 * g), ""),
    "1. relu squared": (lambda g, u, w: (r := F.relu(g)) * r, ""),
    "2. one score per token": (lambda g, u, w: torch.sigmoid(g[:, :, :1]) * u, "broadcasts"),
    "2. a vector": (lambda g, u, w: F.silu(g[0, 0]) * u, "broadcasts"),
    "2. one up": (lambda g, u, w: F.silu(g) * u[:, :, :1], "broadcasts"),
    "3. a weight": (lambda g, u, w: F.silu(g.sum((0, 1))) * w, "weight"),
    "3. an activated weight": (lambda g, u, w: torch.sigmoid(w) * u.sum((0, 1)), "weight"),
    "4. itself": (lambda g, u, w: F.gelu(g) * g, "by itself"),
    "5. clamped after": (lambda g, u, w: F.silu(g).clamp(max=1.0) * u.clamp(-1.0, 1.0), "after the activation"),
    "6. two dtypes": (mixed, "torch.bfloat16"),
    "6. two dtypes, then one": (lambda g, u, w: mixed(g, u, w).to(torch.bfloat16), "torch.bfloat16"),
    "a number": (lambda g, u, w: F.silu(g) * 2, ""),
    "a sum": (lambda g, u, w: F.silu(g) + u, ""),
    "no activation of the dialect": (lambda g, u, w: torch.tanh(g) * u, ""),
    "relu cubed": (lambda g, u, w: F.relu(g) ** 3 * u, ""),
    "a scale after the activation": (lambda g, u, w: (F.silu(g) * 2) * u, ""),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    unit, reason = LEFT[case]
    check_pass(MatchGatedAct(), Gated(unit), matches=0, miss=reason or None, gone={"llmc.gated_act"})
