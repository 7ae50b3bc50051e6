"""MoveScales moves scales into weights and does not change results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import embedding, gated_act, layer_norm, linear, rms_norm
from llmc.passes.base import Fuel
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.optimize.fuse_residual_norm import FuseResidualNorm
from llmc.passes.quantize.move_scales import MoveScales

WIDTH, INNER = 16, 24
Compute = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, compute: Compute, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.gate_up = nn.Parameter(torch.randn(2 * INNER, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(2 * INNER))
        self.down = nn.Parameter(torch.randn(WIDTH, INNER) / 4)
        self.head = self.embed if tied else nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.compute = compute

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.compute(self, embedding(tokens, self.embed))


def two_users(m: Model, x: Tensor) -> Tensor:
    y = rms_norm(x, m.norm, 1e-6)
    return linear(linear(y, m.first) + linear(y, m.second), m.head)


def after_layer_norm(m: Model, x: Tensor) -> Tensor:
    return linear(linear(layer_norm(x, m.norm, m.shift, 1e-6), m.first), m.head)


def after_added_norm(m: Model, x: Tensor) -> Tensor:
    s = x + linear(x, m.second)
    return linear(s + linear(rms_norm(s, m.norm, 1e-6), m.first), m.head)


def after_gated_unit(m: Model, x: Tensor) -> Tensor:
    gate, up = linear(x, m.gate_up, m.bias).split([INNER, INNER], -1)
    return linear(linear(gated_act(gate, up, "silu"), m.down), m.head)


def up_first(m: Model, x: Tensor) -> Tensor:
    up, gate = linear(x, m.gate_up).split([INNER, INNER], -1)
    return linear(linear(gated_act(gate, up, "gelu"), m.down), m.head)


def lm_head(m: Model, x: Tensor) -> Tensor:
    return linear(rms_norm(x, m.norm, 1e-6), m.head)


def used_elsewhere(m: Model, x: Tensor) -> Tensor:
    y = rms_norm(x, m.norm, 1e-6)
    return linear(y + linear(y, m.first), m.head)


def no_weight(m: Model, x: Tensor) -> Tensor:
    return linear(linear(rms_norm(x, None, 1e-6), m.first), m.head)


def no_producer(m: Model, x: Tensor) -> Tensor:
    return linear(linear(torch.relu(x), m.first), m.head)


def norm_used_twice(m: Model, x: Tensor) -> Tensor:
    x = linear(rms_norm(x, m.norm, 1e-6), m.first)
    return linear(rms_norm(x, m.norm, 1e-6), m.head)


def weight_used_twice(m: Model, x: Tensor) -> Tensor:
    return linear(linear(linear(rms_norm(x, m.norm, 1e-6), m.first), m.first), m.head)


def limited(m: Model, x: Tensor) -> Tensor:
    gate, up = linear(x, m.gate_up).split([INNER, INNER], -1)
    return linear(linear(gated_act(gate, up, "silu", 1.0, 3.0), m.down), m.head)


def shifted(m: Model, x: Tensor) -> Tensor:
    gate, up = linear(x, m.gate_up).split([INNER, INNER], -1)
    return linear(linear(gated_act(gate, up, "silu", 1.0, None, 1.0), m.down), m.head)


def moves(name: str, width: int = WIDTH) -> MoveScales:
    return MoveScales({name: torch.exp(torch.linspace(-1, 1, width))})


def program(compute: Compute, tied: bool = False) -> Program:
    result = capture(Model(compute, tied), first=[RemoveNoOps()], stage=Stage.CANONICAL)
    FuseResidualNorm()(result)
    result.stage = Stage.OPTIMIZED
    return result


@pytest.mark.parametrize(
    ("compute", "name", "width"),
    [
        (two_users, "first", WIDTH),
        (after_layer_norm, "first", WIDTH),
        (after_added_norm, "first", WIDTH),
        (after_gated_unit, "down", INNER),
        (up_first, "down", INNER),
        (lm_head, "head", WIDTH),
    ],
)
def test_results_do_not_change(compute: Compute, name: str, width: int) -> None:
    before = program(compute)
    assert before.ops()["llmc.add_rms_norm"] == (compute is after_added_norm)
    after = check_pass(moves(name, width), before, matches=1, again=1)
    changed = {n for n in before.weights if before.weights[n].key != after.weights[n].key}
    expected: dict[Any, set[str]] = {
        two_users: {"norm", "first", "second"},
        after_layer_norm: {"norm", "shift", "first"},
        after_added_norm: {"norm", "first"},
        after_gated_unit: {"gate_up", "bias", "down"},
        up_first: {"gate_up", "down"},
        lm_head: {"norm", "head"},
    }
    assert changed == expected[compute]


def test_weights_are_multiplied_and_divided_by_the_scales() -> None:
    before, subject = program(two_users), moves("first")
    scales = subject.scales["first"]
    after = check_pass(subject, before, matches=1, again=1)
    for name in ("first", "second"):
        torch.testing.assert_close(after.weights[name].evaluate(), before.weights[name].evaluate() * scales)
    torch.testing.assert_close(after.weights["norm"].evaluate(), before.weights["norm"].evaluate() / scales)


def test_embeddings_of_a_tied_head_are_divided_again() -> None:
    before = program(lm_head, True)
    (name,) = (n for n in before.weights if before.weights[n].shape == (VOCAB, WIDTH))
    after = check_pass(moves(name), before, matches=1, there=["aten.mul"], again=1)
    assert after.ops()["llmc.embedding"] == 1 and after.weights[name].key != before.weights[name].key


@pytest.mark.parametrize(
    ("compute", "name", "reason"),
    [
        (used_elsewhere, "first", "uses its input too"),
        (no_weight, "first", "no weight before its input can absorb the scales"),
        (no_producer, "first", "no weight before its input can absorb the scales"),
        (norm_used_twice, "first", "no weight before its input can absorb the scales"),
        (weight_used_twice, "first", "used elsewhere too"),
        (limited, "down", "no weight before its input can absorb the scales"),
        (shifted, "down", "no weight before its input can absorb the scales"),
    ],
)
def test_left_alone(compute: Compute, name: str, reason: str) -> None:
    check_pass(moves(name, INNER if name == "down" else WIDTH), program(compute), matches=0, miss=reason)


def test_fuel() -> None:
    before = program(two_users)
    assert moves("first")(before, Fuel(0)).matches == 0
