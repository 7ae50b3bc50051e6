"""Calls on weights and numbers become lazy weights with the right value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn
from torch.nn import functional as F

from llmc.ir.weights import Call, Leaf
from llmc.passes.match.fold_constants import FoldConstants

WIDTH = 12


class Mixed(nn.Module):
    """`change` of hidden states [B, S, 12] with a vector [12] and a matrix [24, 12]."""

    def __init__(self, change: Callable[[Mixed, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.vector = nn.Parameter(torch.randn(WIDTH).to(dtype))
        self.matrix = nn.Parameter(torch.randn(2 * WIDTH, WIDTH).to(dtype))
        self.register_buffer("table", torch.arange(6.0))
        self.change = change

    def forward(self, tokens: Tensor) -> Tensor:
        return self.change(self, self.embed(tokens))


FOLDS: dict[str, tuple[Callable[[Mixed, Tensor], Tensor], int, set[str], set[str]]] = {
    "an offset norm weight": (lambda m, x: x * (1.0 + m.vector), 1, {"aten.add"}, {"vector_add"}),
    "a chain": (lambda m, x: x * -torch.exp(m.vector * 0.1), 3, {"aten.exp", "aten.neg"}, {"vector_neg"}),
    "a transposed matrix": (lambda m, x: x @ m.matrix.t(), 1, {"aten.t"}, {"matrix_t"}),
    "two weights": (lambda m, x: x * (m.matrix[0] * m.vector), 2, {"aten.select"}, {"matrix_mul"}),
    "concatenated": (lambda m, x: x @ torch.cat([m.matrix, m.vector[None]], 0).t(), 3, {"aten.cat"}, {"matrix_t"}),
    "a function of small numbers": (
        lambda m, x: x + (10000.0 ** -(torch.arange(0, WIDTH, dtype=torch.float32) / WIDTH)),
        4,
        {"aten.arange", "aten.div", "aten.pow"},
        {"constants.arange_pow"},
    ),
    "made full": (lambda m, x: torch.where(x > 0, x, torch.full((), -1e4)), 1, {"aten.full"}, {"constants.full"}),
    "the identity": (lambda m, x: x @ torch.eye(WIDTH), 1, {"aten.eye"}, {"constants.eye"}),
    "expanded but small": (lambda m, x: x * m.vector.expand(3, WIDTH)[1], 2, {"aten.expand"}, {"vector_select"}),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str) -> None:
    change, matches, gone, there = FOLDS[name]
    program = check_pass(FoldConstants(), Mixed(change), matches=matches, gone=gone)
    assert there <= set(program.weights)
    assert all(isinstance(program.weights[name], Call) for name in there)


def test_parts_of_a_split_weight_become_weights() -> None:
    def change(m: Mixed, x: Tensor) -> Tensor:
        gate, up = m.matrix.chunk(2, 0)
        first, rest = m.vector.split([4, 8])
        return F.linear(x, gate) * F.linear(x, up) + torch.cat([rest, first])

    program = check_pass(
        FoldConstants(), Mixed(change), matches=5, gone={"aten.chunk", "aten.split_with_sizes", "getitem"}
    )
    assert set(program.weights) == {"embed.weight", "matrix_chunk_0", "matrix_chunk_1", "vector_cat"}


def test_a_folded_weight_is_evaluated_lazily() -> None:
    module = Mixed(lambda m, x: x * (1.0 + m.vector))
    program = capture(module)
    FoldConstants()(program)
    with torch.no_grad():
        module.vector.fill_(4.0)
    assert torch.equal(program.weights["vector_add"].evaluate(), torch.full((WIDTH,), 5.0))


def test_a_folded_cast_names_no_device() -> None:
    program = check_pass(
        FoldConstants(),
        Mixed(
            lambda m, x: x * m.vector.to(torch.device("cpu"), torch.float32) + m.matrix[1].type_as(x), torch.bfloat16
        ),
        matches=3,
        gone={"aten.to", "aten.type_as", "aten.select"},
    )
    assert program.weights["vector_to_copy"].dtype == torch.float32
    assert isinstance(program.weights["vector_to_copy"].args[0], Leaf)


def test_equal_constants_share_one_weight() -> None:
    def change(m: Mixed, x: Tensor) -> Tensor:
        low, other = torch.full((), -1.0), torch.full((), -2.0)
        return torch.where(x > 0, x, low) + torch.where(x > 1, torch.full((), -1.0), other)

    program = check_pass(FoldConstants(), Mixed(change), matches=3)
    assert {name for name in program.weights if name.startswith("constants")} == {"constants.full", "constants.full_2"}


def test_leaves_a_value_far_larger_than_its_inputs() -> None:
    def change(m: Mixed, x: Tensor) -> Tensor:
        wide = torch.outer(m.matrix.flatten(), m.matrix.flatten())
        return x + wide[:12, 0] + m.vector.expand(5000, WIDTH).sum(0)

    program = check_pass(
        FoldConstants(), Mixed(change), matches=2, miss="far larger", there={"aten.outer", "aten.expand"}
    )
    assert "matrix_flatten" in program.weights


def test_leaves_a_large_tensor_made_from_numbers() -> None:
    check_pass(
        FoldConstants(),
        Mixed(lambda m, x: x + torch.arange(40000.0)[-1]),
        matches=0,
        miss="far larger",
        there={"aten.arange"},
    )


def test_leaves_a_value_that_depends_on_an_input() -> None:
    def change(m: Mixed, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], dtype=torch.float32)
        return x * m.vector + steps[:, None] + m.table[: x.shape[0], None, None].sum() * 0 + torch.zeros_like(x)

    check_pass(FoldConstants(), Mixed(change), matches=0, there={"aten.arange", "aten.slice", "aten.zeros_like"})


def test_leaves_random_numbers() -> None:
    check_pass(
        FoldConstants(),
        Mixed(lambda m, x: x + torch.rand(3)[0] * 0 + F.dropout(m.vector, 0.5, training=True) * 0),
        matches=0,
        miss="random",
        there={"aten.rand", "aten.dropout"},
    )


def test_leaves_uninitialized_memory() -> None:
    # The result does not depend on the memory's content, because x == x is always true.
    check_pass(FoldConstants(), Mixed(lambda m, x: x * ((torch.empty_like(m.vector) > 0) | (x == x))), matches=0)


@pytest.mark.parametrize(("dtype", "matches"), [(torch.float32, 5), (torch.float64, 1)])
def test_folds_a_large_value_up_to_twice_the_size_of_its_inputs(dtype: torch.dtype, matches: int) -> None:
    class Large(Mixed):
        def __init__(self) -> None:
            super().__init__(lambda m, x: x * m.large.t().to(dtype)[0, :WIDTH].to(torch.float32))
            self.large = nn.Parameter(torch.randn(300, 200).to(torch.bfloat16))

    check_pass(FoldConstants(), Large(), matches=matches, miss="far larger" if matches == 1 else None)
