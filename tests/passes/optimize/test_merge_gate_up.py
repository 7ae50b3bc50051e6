"""MergeGateUp makes one linear of the two projections of a gated unit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, check_pass
from torch import Tensor, nn

from llmc.kernels.ops import embedding, gated_act, linear
from llmc.passes.optimize.merge_gate_up import MergeGateUp

WIDTH, INNER = 8, 12


class Mlp(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER, bias), nn.Linear(WIDTH, INNER, bias)
        self.down_proj = nn.Linear(INNER, WIDTH, bias)


class Model(nn.Module):
    """`gate(mlp, x)` [B, S, 12] in two layers between an embedding and a head."""

    def __init__(self, gate: Callable[[Mlp, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Mlp(bias)}) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB)
        self.gate = gate

    def forward(self, tokens: Tensor) -> Tensor:
        x = embedding(tokens, self.embed.weight)
        for layer in self.layers:
            inner = self.gate(layer["mlp"], x)
            x = linear(inner, layer["mlp"].down_proj.weight, layer["mlp"].down_proj.bias)
        return linear(x, self.head.weight, self.head.bias)


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def plain(m: Mlp, x: Tensor) -> Tensor:
    return gated_act(project(x, m.gate_proj), project(x, m.up_proj), "silu")


def up_first(m: Mlp, x: Tensor) -> Tensor:
    up = project(x, m.up_proj)
    return gated_act(project(x, m.gate_proj), up, "gelu_tanh", 1.0, 2.0, 1.0)


def seen_through_shaping(m: Mlp, x: Tensor) -> Tensor:
    up = project(x, m.up_proj)
    return gated_act(project(x, m.gate_proj).unsqueeze(1), up.unsqueeze(1), "silu").squeeze(1) + up


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [plain, up_first, seen_through_shaping])
def test_gate_and_up_become_one_linear(gate: Callable[[Mlp, Tensor], Tensor], bias: bool) -> None:
    module = Model(gate, bias)
    program = check_pass(MergeGateUp(), module, matches=2, there={"aten.split_with_sizes", "llmc.gated_act"})
    assert program.ops()["llmc.linear"] == 5
    for place, layer in enumerate(module.layers):
        mlp = layer["mlp"]
        merged = program.weights[f"layers.{place}.mlp.gate_up_proj.weight"]
        assert torch.equal(merged.evaluate(), torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        assert (f"layers.{place}.mlp.gate_up_proj.bias" in program.weights) == bias


def merged_already(m: Mlp, x: Tensor) -> Tensor:
    gate, up = project(x, m.gate_proj).chunk(2, -1)
    return gated_act(gate, up, "silu").repeat(1, 1, 2)


def one_projection(m: Mlp, x: Tensor) -> Tensor:
    gate = project(x, m.gate_proj)
    return gated_act(gate, gate, "silu")


def other_inputs(m: Mlp, x: Tensor) -> Tensor:
    return gated_act(project(x, m.gate_proj), project(x.flip(-1), m.up_proj), "silu")


def shared_weight(m: Mlp, x: Tensor) -> Tensor:
    return gated_act(project(x, m.gate_proj), project(x, m.up_proj), "silu") + project(x.flip(-1), m.up_proj)


def one_bias(m: Mlp, x: Tensor) -> Tensor:
    return gated_act(project(x, m.gate_proj), linear(x, m.up_proj.weight), "silu")


def computed_weight(m: Mlp, x: Tensor) -> Tensor:
    return gated_act(linear(x, m.gate_proj.weight * x.mean()), linear(x, m.up_proj.weight), "silu")


def computed_biases(m: Mlp, x: Tensor) -> Tensor:
    gate, up = (linear(x, w.weight, w.bias * x.mean()) for w in (m.gate_proj, m.up_proj))
    return gated_act(gate, up, "silu")


LEFT: dict[str, tuple[Callable[[Mlp, Tensor], Tensor], str]] = {
    "1. merged already": (merged_already, "two projections"),
    "1. one projection for both": (one_projection, "two projections"),
    "2. other inputs": (other_inputs, "different inputs"),
    "3. a weight that is used elsewhere": (shared_weight, "elsewhere"),
    "4. one bias": (one_bias, "some projections have a bias"),
    "5. a computed weight": (computed_weight, "weight is computed"),
    "5. computed biases": (computed_biases, "bias is computed"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_gated_units_are_left_alone(name: str) -> None:
    gate, reason = LEFT[name]
    check_pass(MergeGateUp(), Model(gate, bias=True), matches=0, miss=reason)
