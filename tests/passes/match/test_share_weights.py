"""ShareWeights merges weights with the same expression and reads no values."""

from __future__ import annotations

import pytest
import torch
from check_pass import VOCAB, check_pass, inputs
from torch import Tensor, nn

from llmc.compiler.frontend.capture import trace
from llmc.ir.program import Program
from llmc.ir.weights import Weight, cast, fold, parameter, transpose
from llmc.kernels.ops import embedding, linear
from llmc.passes.base import Fuel
from llmc.passes.match.share_weights import ShareWeights

TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A model with three square matrices, the first of them an embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = (nn.Parameter(torch.empty(VOCAB, VOCAB)) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return linear(linear(embedding(tokens, self.embed), self.middle), self.head)


def program(embed: Weight, middle: Weight, head: Weight) -> Program:
    return trace(Model(), {"embed": embed, "middle": middle, "head": head}, "Model", 32)


A = parameter(TABLE, "a")
SHARED: dict[str, tuple[Weight, Weight, Weight, set[str]]] = {
    "one tensor": (A, fold(A, 2.0), A, {"embed", "middle"}),
    "one tensor under two names": (A, fold(A, 2.0), parameter(TABLE, "b"), {"embed", "middle"}),
    "one expression": (A, transpose(A), transpose(A), {"embed", "middle"}),
    "all three": (A, A, A, {"embed"}),
}


@pytest.mark.parametrize("name", SHARED)
def test_equal_expressions_share_one_weight(name: str) -> None:
    *weights, kept = SHARED[name]
    result = check_pass(ShareWeights(), program(*weights), matches=3 - len(kept))
    assert set(result.weights) == kept


def test_fuel_stops_it() -> None:
    shared = program(A, A, A)
    assert ShareWeights()(shared, Fuel(1)).matches == 1
    assert set(shared.weights) == {"embed", "head"}
    torch.testing.assert_close(shared(*inputs(1, 3)), program(A, A, A)(*inputs(1, 3)))


LEFT: dict[str, tuple[Weight, Weight, Weight]] = {
    "1. equal by value": (A, parameter(TABLE.clone(), "a"), parameter(TABLE + 0, "a")),
    "another expression of it": (A, transpose(A), fold(A, 2.0)),
    "another number": (A, fold(A, 3.0), fold(A, 2.0)),
    "rounded to different dtypes": (
        A,
        cast(cast(A, torch.bfloat16), torch.float32),
        cast(cast(A, torch.float16), torch.float32),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    result = check_pass(ShareWeights(), program(*LEFT[name]), matches=0)
    assert set(result.weights) == {"embed", "middle", "head"}
