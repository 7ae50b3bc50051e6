"""Token-independent values are found and evaluated."""

from __future__ import annotations

import pytest
import torch
from check_pass import VOCAB, capture
from torch import Tensor, fx, nn

from llmc.ir.program import Program
from llmc.passes.match.token_independent import TokenIndependentValues, Unknown
from llmc.passes.queries import is_call


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 4)
        self.register_buffer("grid", torch.randn(32, 32), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens)
        size = tokens.shape[1]
        of_shape = torch.ones_like(x).cumsum(1)  # token-independent: only the shape of x is used
        of_size = self.grid[:size, :size].sin()
        of_positions = positions.cos()[:, :, None]
        of_tokens = x.exp()
        return of_tokens + of_shape + of_positions + of_size.mean()


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Model())


def the(program: Program, *ops: str) -> fx.Node:
    (node,) = (n for n in program.nodes if is_call(n, *ops))
    return node


def test_finds_token_independent_nodes(program: Program) -> None:
    values = TokenIndependentValues(program)
    assert the(program, "cumsum") in values
    assert the(program, "sin") in values
    assert the(program, "cos") in values
    assert the(program, "exp") not in values
    assert program.inputs[0] not in values
    assert program.output not in values


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (1, 32)])
def test_values_at_a_size(program: Program, batch: int, length: int) -> None:
    at = TokenIndependentValues(program).at(batch, length)
    assert torch.equal(at(the(program, "cumsum")), torch.ones(batch, length, 4).cumsum(1))
    grid = program.weights["grid"].evaluate()
    assert torch.equal(at(the(program, "sin")), grid[:length, :length].sin())
    assert torch.equal(at(the(program, "cos")), torch.arange(length).cos().expand(batch, -1))
    assert at.shape(the(program, "exp")) == [batch, length, 4]


def test_a_number_must_be_the_same_at_every_size(program: Program) -> None:
    values = TokenIndependentValues(program)
    assert values.number(2) == 2.0
    assert values.number(the(program, "mean")) is None
    assert values.number(the(program, "exp")) is None


def test_a_random_value_is_not_token_independent() -> None:
    class Random(Model):
        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            return super().forward(tokens, positions) + torch.rand(tokens.shape[1], 1).tanh()

    program = capture(Random())
    assert the(program, "tanh") not in TokenIndependentValues(program)


def test_a_value_that_is_too_large_is_refused(program: Program) -> None:
    with pytest.raises(Unknown, match="too large to evaluate"):
        TokenIndependentValues(program).at(1 << 26, 1)(the(program, "cumsum"))
