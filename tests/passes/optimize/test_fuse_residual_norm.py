"""FuseResidualNorm makes one op of a residual add and a norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, check_pass
from torch import Tensor, nn

from llmc.kernels.ops import embedding, linear, rms_norm
from llmc.passes.optimize.fuse_residual_norm import FuseResidualNorm

WIDTH, EPS = 8, 1e-5
Change = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """`change(model, x, r)` of two values [B, S, 8] between an embedding and a head."""

    def __init__(self, change: Change, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.side = nn.Embedding(VOCAB, WIDTH)
        self.weights = nn.ParameterList([torch.rand(WIDTH) + 0.5 for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB)
        self.change, self.dtype = change, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        x, r = (embedding(tokens, table.weight).to(self.dtype) for table in (self.embed, self.side))
        return linear(self.change(self, x, r).float(), self.head.weight, self.head.bias)


def norm(m: Model, x: Tensor, place: int = 0) -> Tensor:
    return rms_norm(x, m.weights[place], EPS)


def chain(m: Model, x: Tensor, r: Tensor) -> Tensor:
    """Two blocks, each of which adds its residual to the stream."""
    x = x + r
    x = x + norm(m, x).sin()
    return norm(m, x, 1)


def used_before_and_after(m: Model, x: Tensor, r: Tensor) -> Tensor:
    total = x + r
    early = total.exp()
    return norm(m, total) + early + total.sin()


def two_norms(m: Model, x: Tensor, r: Tensor) -> Tensor:
    """Parallel blocks: two norms of the same sum."""
    total = x + r
    return norm(m, total) * norm(m, total, 1)


FUSED: dict[str, tuple[Change, int, int]] = {
    "one": (lambda m, x, r: norm(m, x + r), 1, 0),
    "in place": (lambda m, x, r: norm(m, (x * 1.5).add_(r)), 1, 0),
    "alpha of one": (lambda m, x, r: norm(m, torch.add(x, r, alpha=1)), 1, 0),
    "one value twice": (lambda m, x, r: norm(m, x + x), 1, 0),
    "no weight": (lambda m, x, r: rms_norm(x + r, None, EPS), 1, 0),
    "a chain": (chain, 2, 0),
    "other users": (used_before_and_after, 1, 2),
    "two norms": (two_norms, 1, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_add_and_norm_become_one_op(name: str) -> None:
    change, matches, adds = FUSED[name]
    program = check_pass(FuseResidualNorm(), Model(change), matches=matches, there={"llmc.add_rms_norm"})
    assert program.ops()["aten.add"] == adds
    assert program.ops()["llmc.rms_norm"] == (1 if name == "two norms" else 0)


def test_half_precision_rounds_the_sum_as_before() -> None:
    def change(m: Model, x: Tensor, r: Tensor) -> Tensor:
        total = x + r
        return rms_norm(total, None, EPS) + total

    check_pass(FuseResidualNorm(), Model(change, torch.bfloat16), matches=1, atol=0.0)


LEFT: dict[str, tuple[Change, str | None]] = {
    "1. one vector for all tokens": (lambda m, x, r: norm(m, x + r.mean((0, 1))), "broadcasts"),
    "1. the other way": (lambda m, x, r: norm(m, r.mean((0, 1)) + x), "broadcasts"),
    "1. one channel for all": (lambda m, x, r: norm(m, x + r[..., :1]), "broadcasts"),
    "1. a number": (lambda m, x, r: norm(m, x + 1.5), "adds a number"),
    "2. a wider residual": (lambda m, x, r: norm(m, x.to(torch.bfloat16) + r), "dtypes differ"),
    "2. a narrower residual": (lambda m, x, r: norm(m, x + r.to(torch.float16)), "dtypes differ"),
    "3. a scaled operand": (lambda m, x, r: norm(m, torch.add(x, r, alpha=2)), "scales its second operand"),
    "4. a weight that is computed": (
        lambda m, x, r: rms_norm(x + r, m.weights[0] * r.mean(), EPS),
        "weight is computed",
    ),
    "4. a weight that follows from the sum": (
        lambda m, x, r: rms_norm(x + r, (x + r).mean((0, 1)), EPS),
        "weight is computed",
    ),
    "a difference": (lambda m, x, r: norm(m, x - r), None),
    "something between": (lambda m, x, r: norm(m, (x + r).sin()), None),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_adds_are_left_alone(name: str) -> None:
    change, reason = LEFT[name]
    check_pass(FuseResidualNorm(), Model(change), matches=0, gone={"llmc.add_rms_norm"}, miss=reason)
