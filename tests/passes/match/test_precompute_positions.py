"""Values that depend on the position alone become lookups; others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import SIZES, VOCAB, capture, check_pass, inputs
from torch import Tensor, nn

from llmc.passes.base import PassResult
from llmc.passes.match.precompute_positions import PrecomputePositions

WIDTH = 8
MAX = 32
Angle = Callable[["Model", Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """`mix(model, h, positions, tokens)` between embedding [B, S, 8] and LM head."""

    def __init__(self, mix: Angle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.places = nn.Embedding(MAX, WIDTH)
        self.learned = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("frequencies", torch.rand(WIDTH) + 0.1)
        self.mix = mix

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.mix(self, self.embed(tokens), positions, tokens))


def angles(model: Model, positions: Tensor) -> Tensor:
    return positions[:, :, None].float() * model.frequencies


# Name: (how positions are mixed into h, the number of lookups they become).
TABLES: dict[str, tuple[Angle, int]] = {
    "llama": (
        lambda m, h, p, t: (
            h * (m.frequencies[None, :, None].expand(p.shape[0], -1, 1) @ p[:, None, :].float()).transpose(1, 2).cos()
        ),
        1,
    ),
    "added sines": (lambda m, h, p, t: h + angles(m, p).sin(), 1),
    "scaled": (lambda m, h, p, t: h * (angles(m, p).cos() * 1.3 + 0.1), 1),
    "cos and sin": (lambda m, h, p, t: h * angles(m, p).cos() + h.flip(-1) * angles(m, p).sin(), 2),
    "one value twice": (lambda m, h, p, t: h * angles(m, p).cos() + angles(m, p).cos(), 2),
    "sequence first": (lambda m, h, p, t: (h.transpose(0, 1) + angles(m, p).transpose(0, 1).tan()).transpose(0, 1), 1),
    "width first": (
        lambda m, h, p, t: (h.permute(2, 1, 0) + (m.frequencies[:, None, None] * p.T).cos()).permute(2, 1, 0),
        1,
    ),
    "two more dims": (
        lambda m, h, p, t: (h.unflatten(2, (2, 4)) * angles(m, p).unflatten(2, (2, 4)).sum(2, True).cos()).flatten(2),
        1,
    ),
    "no more dims": (lambda m, h, p, t: h * torch.log1p(p.float())[..., None], 1),
    "complex": (
        lambda m, h, p, t: torch.view_as_real(
            torch.view_as_complex(h.unflatten(2, (-1, 2)))
            * torch.polar(angles(m, p)[..., :4].exp(), angles(m, p)[..., 4:])
        ).flatten(2),
        1,
    ),
    "integers on the way": (lambda m, h, p, t: h * ((p // 4) * (p % 3)).float()[..., None].cos(), 1),
    "half precision": (lambda m, h, p, t: h * (angles(m, p).to(torch.bfloat16).cos() * 2), 1),
    "double precision": (lambda m, h, p, t: (h * angles(m, p).double().cos()).float(), 1),
    "with the batch's size": (lambda m, h, p, t: h * (angles(m, p) + torch.zeros(p.shape[0], 1, 1)).cos(), 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_computation_on_positions_becomes_a_table(name: str) -> None:
    mix, lookups = TABLES[name]
    module = Model(mix)
    program = check_pass(
        PrecomputePositions(),
        module,
        matches=lookups,
        gone={"aten.cos", "aten.sin", "aten.tan", "aten.log1p", "aten.polar", "aten.floor_divide"},
        there={"llmc.embedding"},
    )
    tables = [weight for name, weight in program.weights.items() if name.startswith("tables.")]
    assert len(tables) == program.ops()["llmc.embedding"]
    assert all(table.is_constant and table.shape[0] == MAX for table in tables)
    # Positions may be in any order and repeat.
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        tokens, _ = inputs(*size)
        positions = torch.randint(0, MAX, size, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(program(tokens, positions), module(tokens, positions), atol=1e-5, rtol=0)


def test_equal_values_share_one_lookup() -> None:
    program = check_pass(PrecomputePositions(), Model(TABLES["one value twice"][0]), matches=2)
    assert program.ops()["llmc.embedding"] == 1
    assert [w.shape for w in program.weights.values() if w.is_constant] == [(MAX, WIDTH)]


def test_equal_tables_of_different_dtypes_are_not_shared() -> None:
    """All tables are zero, so their bytes alone do not distinguish them."""

    def mix(model: Model, h: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        zero = angles(model, positions) * 0
        brief, half = zero.to(torch.bfloat16) * 2, zero.to(torch.float16) * 2
        return h * zero + h * brief + (h.to(torch.float16) * half).float() + 1

    check_pass(PrecomputePositions(), Model(mix), matches=3)


def test_views_stay_after_the_lookup() -> None:
    """Thus layers with different casts and views of the same values share one table."""

    def mix(model: Model, h: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        cos = angles(model, positions).cos()
        return h * cos.to(torch.bfloat16) + (h.unsqueeze(1) * cos.unsqueeze(1)).squeeze(1)

    program = check_pass(PrecomputePositions(), Model(mix), matches=1, gone={"aten.cos"})
    assert [(w.shape, w.dtype) for w in program.weights.values() if w.is_constant] == [((MAX, WIDTH), torch.float32)]


def longest(model: Model, positions: Tensor, threshold: int) -> Tensor:
    """Angles that shrink when any position is large, as with dynamic scaling."""
    far = positions.max() >= threshold
    return angles(model, positions) * torch.where(far, 0.5, 1.0)


LEFT: dict[str, tuple[Angle, str | None]] = {
    "1. an index of a learned table": (lambda m, h, p, t: h + m.places(p), None),
    "1. an index that is computed": (lambda m, h, p, t: h + m.places((p * 3 + 1) % MAX), None),
    "1. a mask": (lambda m, h, p, t: torch.where((p % 2 == 0)[..., None], h, -h), None),
    "2. the longest position": (lambda m, h, p, t: h * longest(m, p, 16).cos(), "other positions"),
    "2. the longest position, rarely": (lambda m, h, p, t: h * longest(m, p, 31).cos(), "other positions"),
    "2. the longest position, nearly always": (
        lambda m, h, p, t: h * longest(m, p, 2).cos(),
        "other positions",
    ),
    "2. the position before": (lambda m, h, p, t: h * angles(m, p - p.roll(1, 1)).cos(), "other positions"),
    "2. the mean of the batch": (
        lambda m, h, p, t: h * (angles(m, p) - angles(m, p).mean(0, True)).cos(),
        "other positions",
    ),
    "2. the length": (lambda m, h, p, t: h * (angles(m, p) / p.shape[1]).cos(), "other positions"),
    "3. of the first sequence": (
        lambda m, h, p, t: h * (p[0, :, None].float() * m.frequencies).cos(),
        "exactly one dim each",
    ),
    "3. the first position of each sequence": (lambda m, h, p, t: h * angles(m, p[:, :1]).cos(), "one dim each"),
    "3. between pairs of positions": (
        lambda m, h, p, t: (
            h * (p[:, :, None] - p[:, None, :]).float().cos().sum(-1, True)
            + ((p[:, :, None] - p[:, None, :]).float().sin() @ h)
        ),
        "exactly one dim each",
    ),
    "3. a dim that is not static": (
        lambda m, h, p, t: h * (h[..., :1] * (p[:, :, None].float().cos() * torch.ones(t.shape[0] + 1))).sum(-1, True),
        "is dynamic",
    ),
    "trained frequencies": (lambda m, h, p, t: h * (p[:, :, None].float() * m.learned).cos(), None),
    "tokens": (lambda m, h, p, t: h * (t[:, :, None].float() * m.frequencies).cos(), None),
    "positions as they are": (lambda m, h, p, t: h + p[:, :, None].float(), None),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    mix, reason = LEFT[name]
    check_pass(PrecomputePositions(), Model(mix), matches=0, miss=reason)


def test_unused_positions_are_no_candidate() -> None:
    program = capture(Model(lambda m, h, p, t: h))
    before = str(program)
    assert PrecomputePositions()(program) == PassResult(0, [])
    assert str(program) == before
