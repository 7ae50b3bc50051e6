"""Prune replaces weights; `prunable` lists why weights cannot be pruned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, inputs
from torch import Tensor, nn

from llmc.errors import LlmcError
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.stored import StoredCodes
from llmc.ir.weights import constant, parameter
from llmc.kernels.ops import embedding, linear
from llmc.passes.base import Fuel
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.quantize.prune import Prune, prunable

WIDTH, ODD = 16, 18
Compute = Callable[["Model", Tensor], Tensor]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(ODD, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(WIDTH, ODD) / 4)
        self.wide = nn.Parameter(torch.randn(VOCAB, WIDTH) / 4)

    def forward(self, x: Tensor, compute: Callable[[Layer, Tensor], Tensor]) -> Tensor:
        return compute(self, x)


class Model(nn.Module):
    def __init__(self, compute: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.layers = nn.ModuleList([Layer()])
        self.head = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.compute = compute

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return linear(self.layers[0](embedding(tokens, self.embed), self.compute), self.head)


def program(compute: Callable[[Layer, Tensor], Tensor]) -> Program:
    return capture(Model(compute), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)


def plain(m: Layer, x: Tensor) -> Tensor:
    return x + linear(torch.relu(linear(x, m.up)), m.down)


def twice(m: Layer, x: Tensor) -> Tensor:
    """Two linears share a weight."""
    return linear(torch.relu(linear(linear(torch.relu(linear(x, m.up)), m.down), m.up)), m.down)


def used_elsewhere(m: Layer, x: Tensor) -> Tensor:
    return x + linear(torch.relu(linear(x, m.up)), m.down) + m.up.sum()


UP, DOWN, HEAD = "layers.0.up", "layers.0.down", "head"


@pytest.mark.parametrize("compute", [plain, twice])
def test_the_program_uses_pruned_weights(compute: Callable[[Layer, Tensor], Tensor]) -> None:
    before = program(compute)
    pruned = {name: before.weights[name].evaluate() * (torch.rand(ODD, WIDTH) > 0.5).view(shape) for name, shape in
              ((UP, (ODD, WIDTH)), (DOWN, (WIDTH, ODD)))}  # fmt: skip
    expected = Model(compute)
    with torch.no_grad():
        expected.layers[0].up.copy_(pruned[UP])
        expected.layers[0].down.copy_(pruned[DOWN])
    changed = before.copy()
    subject = Prune({name: parameter(value, name) for name, value in pruned.items()}, {HEAD: "it is the head"})
    result = subject(changed)
    assert result.matches == 2 and [miss.reason for miss in result.misses] == ["it is the head"]
    assert subject(changed).matches == 0
    tokens = inputs(3, 7)
    torch.testing.assert_close(changed(*tokens), expected(*tokens), atol=1e-5, rtol=0)
    assert not torch.allclose(changed(*tokens), before(*tokens), atol=1e-2)
    assert changed.ops() == before.ops()


def test_fuel() -> None:
    before = program(plain)
    weights = {name: parameter(torch.zeros(before.weights[name].shape), name) for name in (UP, DOWN)}
    assert Prune(weights)(before, Fuel(1)).matches == 1
    assert [float(before.weights[name].evaluate().abs().sum()) > 0 for name in (UP, DOWN)] == [False, True]


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(LlmcError, match="IR_INVALID"):
        Prune({UP: parameter(torch.zeros(2, 2), UP)})(program(plain))


def test_prunable_weights() -> None:
    assert prunable(program(plain), None) == {UP: "", DOWN: "", HEAD: "it is the head"}
    reasons = prunable(program(plain), 4)
    assert (reasons[UP], reasons[DOWN]) == ("", "its 18 inputs don't divide into groups of 4")
    assert prunable(program(twice), None) == {UP: "", DOWN: "", HEAD: "it is the head"}
    assert "reads it too" in prunable(program(used_elsewhere), None)[UP]


def test_stored_codes_cannot_be_pruned() -> None:
    before = program(plain)
    codes = torch.zeros(ODD, WIDTH, dtype=torch.int8)
    before.weights[UP] = StoredCodes(
        parameter(codes, "codes"), parameter(torch.ones(ODD, 1), "scales"), None, "int8", 16
    )
    assert prunable(before, None)[UP] == "the checkpoint holds it as codes"


def test_constants_are_not_listed() -> None:
    before = program(plain)
    before.weights[UP] = constant(torch.zeros(ODD, WIDTH), "table")
    assert list(prunable(before, None)) == [DOWN, HEAD]
