"""MatchActivation finds spelled-out activations in any order of operands."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation

from llmc.passes.match.match_activation import MatchActivation

WIDTH = 12
Act = Callable[[Tensor], Tensor]


class Activated(nn.Module):
    """`act` of a projection [B, S, 12], between embedding and LM head."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.act = act

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.act(2 * self.project(self.embed(tokens))).float())


SLOPE = math.sqrt(2 / math.pi)
erf, tanh, sigmoid = torch.erf, torch.tanh, torch.sigmoid


def bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


# Name: (activation, the ATen call it becomes, an op that must be gone).
SPELLINGS: dict[str, tuple[Act, str, str]] = {
    "gelu python": (GELUActivation(use_gelu_python=True), "aten.gelu", "aten.erf"),
    "gelu, numbers last": (lambda x: 0.5 * (x * (erf(x * 0.7071067811865476) + 1)), "aten.gelu", "aten.erf"),
    "gelu, numbers inside": (lambda x: (0.5 + erf(x / math.sqrt(2)) / 2) * x, "aten.gelu", "aten.erf"),
    "gelu, half last": (lambda x: x * (1 + erf(x * 0.5**0.5)) / 2, "aten.gelu", "aten.erf"),
    "gelu_new": (NewGELUActivation(), "aten.gelu", "aten.tanh"),
    "gelu_fast": (FastGELUActivation(), "aten.gelu", "aten.tanh"),
    "gelu_pytorch_tanh": (GELUTanh(use_gelu_tanh_python=True), "aten.gelu", "aten.tanh"),
    "bloom": (bloom, "aten.gelu", "aten.tanh"),
    "gelu tanh, cubed": (
        lambda x: 0.5 * x * (1 + tanh(SLOPE * (x + 0.044715 * x * x.square()))),
        "aten.gelu",
        "aten.tanh",
    ),
    "silu": (lambda x: x * sigmoid(x), "aten.silu", "aten.sigmoid"),
    "silu, commuted": (lambda x: sigmoid(1.0 * x) * x, "aten.silu", "aten.sigmoid"),
    "silu of a double": (lambda x: (y := x * 2) * sigmoid(y), "aten.silu", "aten.sigmoid"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_becomes_one_call(spelling: str) -> None:
    act, call, gone = SPELLINGS[spelling]
    check_pass(MatchActivation(), Activated(act), matches=1, gone={gone}, there={call})


def test_gelu_and_its_tanh_approximation_are_distinguished() -> None:
    for act, approximate in ((GELUActivation(use_gelu_python=True), "none"), (NewGELUActivation(), "tanh")):
        program = check_pass(MatchActivation(), Activated(act), matches=1)
        (gelu,) = [n for n in program.nodes if "gelu" in str(n.target)]
        assert gelu.kwargs.get("approximate", "none") == approximate


def test_finds_the_activation_of_a_gated_unit() -> None:
    module = Activated(lambda x: (x + 1) * NewGELUActivation()(x))
    check_pass(MatchActivation(), module, matches=1, gone={"aten.tanh"}, there={"aten.gelu"})


LEFT: dict[str, tuple[Act, str]] = {
    "1. quick gelu": (lambda x: x * sigmoid(1.702 * x), ""),
    "2. another slope": (lambda x: 0.5 * x * (1 + tanh(0.79 * (x + 0.044715 * x**3))), "not that of a gelu"),
    "2. another cubic": (lambda x: 0.5 * x * (1 + tanh(SLOPE * (x + 0.0447 * x**3))), "not that of a gelu"),
    "2. a square for a cube": (lambda x: 0.5 * x * (1 + tanh(SLOPE * (x + 0.044715 * x**2))), "not that of a gelu"),
    "2. another width": (lambda x: 0.5 * x * (1 + erf(x / 1.5)), "not that of a gelu"),
    "2. a constant inside": (lambda x: 0.5 * x * (1 + erf((x + 1) / 2**0.5)), "not that of a gelu"),
    "2. another factor": (lambda x: 0.6 * x * (1 + erf(x / 2**0.5)), ""),
    "2. another sum": (lambda x: 0.5 * x * (1.5 + erf(x / 2**0.5)), ""),
    "2. a doubled silu": (lambda x: 2 * x * sigmoid(x), ""),
    "3. whole numbers": (lambda x: (n := (4 * x).long()) * sigmoid(n), "not floating point"),
    "a wider gate": (lambda x: x * sigmoid(x.double()), ""),
    "another shape": (lambda x: x[:, :, :1] * sigmoid(x), ""),
    "laplace": (lambda x: 0.5 * (1 + erf((x - 0.7) / 0.4)), ""),
    "another value": (lambda x: (x + 1) * sigmoid(x), ""),
    "a divided sigmoid": (lambda x: x / sigmoid(x), ""),
    "a sum of erf and tanh": (lambda x: 0.5 * x * (erf(x) + tanh(x)), ""),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    act, reason = LEFT[case]
    check_pass(MatchActivation(), Activated(act), matches=0, miss=reason or None, gone={"aten.gelu", "aten.silu"})


def test_deeply_nested_products_are_not_searched_exhaustively() -> None:
    def powers(x: Tensor) -> Tensor:
        y = x
        for _ in range(30):
            y = y * y.tanh().add(1) * y
        return x * tanh(y)

    assert MatchActivation()(capture(Activated(powers))).matches == 0
