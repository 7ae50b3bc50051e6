"""Linears read pruned weights, and what others read or nobody can prune stays."""

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
    """One weight of two linears."""
    return linear(torch.relu(linear(linear(torch.relu(linear(x, m.up)), m.down), m.up)), m.down)


def read_elsewhere(m: Layer, x: Tensor) -> Tensor:
    return x + linear(torch.relu(linear(x, m.up)), m.down) + m.up.sum()


UP, DOWN, HEAD = "layers.0.up", "layers.0.down", "head"


@pytest.mark.parametrize("compute", [plain, twice])
def test_the_program_reads_them(compute: Callable[[Layer, Tensor], Tensor]) -> None:
    given = program(compute)
    pruned = {name: given.weights[name].evaluate() * (torch.rand(ODD, WIDTH) > 0.5).view(shape) for name, shape in
              ((UP, (ODD, WIDTH)), (DOWN, (WIDTH, ODD)))}  # fmt: skip
    other = Model(compute)
    with torch.no_grad():
        other.layers[0].up.copy_(pruned[UP])
        other.layers[0].down.copy_(pruned[DOWN])
    made = given.copy()
    subject = Prune({name: parameter(value, name) for name, value in pruned.items()}, {HEAD: "it is the head"})
    result = subject(made)
    assert result.matches == 2 and [miss.reason for miss in result.misses] == ["it is the head"]
    assert subject(made).matches == 0
    tokens = inputs(3, 7)
    torch.testing.assert_close(made(*tokens), other(*tokens), atol=1e-5, rtol=0)
    assert not torch.allclose(made(*tokens), given(*tokens), atol=1e-2)
    assert made.ops() == given.ops()


def test_fuel() -> None:
    given = program(plain)
    weights = {name: parameter(torch.zeros(given.weights[name].shape), name) for name in (UP, DOWN)}
    assert Prune(weights)(given, Fuel(1)).matches == 1
    assert [float(given.weights[name].evaluate().abs().sum()) > 0 for name in (UP, DOWN)] == [False, True]


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(LlmcError, match="IR_INVALID"):
        Prune({UP: parameter(torch.zeros(2, 2), UP)})(program(plain))


def test_what_can_be_pruned() -> None:
    assert prunable(program(plain), None) == {UP: "", DOWN: "", HEAD: "it is the head"}
    found = prunable(program(plain), 4)
    assert (found[UP], found[DOWN]) == ("", "its 18 inputs don't divide into groups of 4")
    assert prunable(program(twice), None) == {UP: "", DOWN: "", HEAD: "it is the head"}
    assert "reads it too" in prunable(program(read_elsewhere), None)[UP]


def test_the_checkpoints_own_codes_stay() -> None:
    given = program(plain)
    codes = torch.zeros(ODD, WIDTH, dtype=torch.int8)
    given.weights[UP] = StoredCodes(
        parameter(codes, "codes"), parameter(torch.ones(ODD, 1), "scales"), None, "int8", 16
    )
    assert prunable(given, None)[UP] == "the checkpoint holds it as codes"


def test_what_belongs_to_the_architecture_is_no_weight() -> None:
    given = program(plain)
    given.weights[UP] = constant(torch.zeros(ODD, WIDTH), "table")
    assert list(prunable(given, None)) == [DOWN, HEAD]
