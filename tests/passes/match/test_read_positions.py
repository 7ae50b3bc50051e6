"""Positions that a model counts by itself become lookups by position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass, inputs
from torch import Tensor, nn
from zoo.tiny import tiny_model

import llmc
from llmc.ir.stages import Stage
from llmc.passes.match.read_positions import ReadPositions

WIDTH = 8
MAX = 32
Mix = Callable[["Model", Tensor, int], Tensor]


class Model(nn.Module):
    """`mix(model, h, length)` of embeddings [B, S, 8]; it gets no positions."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.places = nn.Embedding(MAX + 2, WIDTH)
        self.register_buffer("frequencies", torch.rand(WIDTH) + 0.1)
        self.register_buffer("steps", torch.arange(2 * MAX)[None])
        self.mix = mix

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.mix(self, self.embed(tokens), tokens.shape[1]))


def counted(h: Tensor) -> Tensor:
    """1, 2, 3 ... in each sequence, as the cumulative sum of a mask."""
    return torch.ones(h.shape[:2], dtype=torch.int64).cumsum(1)


# Name: (how the model counts, the number of matches).
FOUND: dict[str, tuple[Mix, int]] = {
    "opt": (lambda m, h, s: h + m.places(torch.arange(s)), 1),
    "bart": (lambda m, h, s: h + m.places(torch.arange(s)[None] + 2), 1),
    "mvp": (lambda m, h, s: h + m.places(torch.arange(s).expand(h.shape[0], -1) + 2), 1),
    "prophetnet": (lambda m, h, s: h + m.places(counted(h)), 1),
    "a slice of a buffer": (lambda m, h, s: h + m.places(m.steps[:, :s]), 1),
    "a slice of a table": (lambda m, h, s: h + m.places.weight[1 : s + 1], 1),
    "roformer": (
        lambda m, h, s: (h.unflatten(2, (2, 4)).transpose(1, 2) * m.places(torch.arange(s))[None, None, :, :4])
        .transpose(1, 2)
        .flatten(2),
        1,
    ),
    "moss": (lambda m, h, s: h * (torch.arange(s)[None, :, None].float() * m.frequencies).cos(), 1),
    "llama4": (lambda m, h, s: h * (((torch.arange(s) + 1.0) / 4).floor().log1p() * 0.1 + 1)[None, :, None], 1),
    "sequence first": (
        lambda m, h, s: (h.transpose(0, 1) + m.places(torch.arange(s))[:, None]).transpose(0, 1), 1,
    ),
    "numbers": (lambda m, h, s: h + torch.arange(s)[:, None], 1),
    "on the right of the tokens": (lambda m, h, s: torch.arange(s)[:, None] - h, 1),
    "two users": (lambda m, h, s: (p := m.places(torch.arange(s))) * (h + p), 1),
    "users of different shapes": (
        lambda m, h, s: (p := m.places(torch.arange(s))) + (h + p) + (h[:, None] * p).sum(1), 1,
    ),
    "joined": (
        lambda m, h, s: torch.cat([h, m.places(torch.arange(s)).expand(h.shape[0], -1, -1)], 2)
        .unflatten(2, (2, WIDTH))
        .sum(2),
        1,
    ),
    "even and odd": (lambda m, h, s: torch.where((torch.arange(s) % 2 == 0)[None, :, None], h, -h), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_counted_positions_are_looked_up(name: str) -> None:
    mix, matches = FOUND[name]
    module = Model(mix)
    program = check_pass(
        ReadPositions(), module, matches=matches, gone={"aten.arange", "aten.cumsum"}, there={"llmc.embedding"}
    )
    tables = [weight for name, weight in program.weights.items() if name.startswith("tables.")]
    assert [w.shape[0] for w in tables] == [MAX]

    # Each sequence is the end of a longer one that starts at position 0.
    length, shifts = 7, (0, 3, 9)
    longest, _ = inputs(len(shifts), length + max(shifts))
    tokens = torch.stack([one[shift : shift + length] for one, shift in zip(longest, shifts, strict=True)])
    positions = torch.arange(length) + torch.tensor(shifts)[:, None]
    with torch.no_grad():
        whole = module(longest, positions)
    want = torch.stack([one[shift : shift + length] for one, shift in zip(whole, shifts, strict=True)])
    torch.testing.assert_close(program(tokens, positions), want, atol=1e-5, rtol=0)


def test_equal_tables_share_one_lookup_whatever_the_shape_of_the_values() -> None:
    def mix(model: Model, h: Tensor, length: int) -> Tensor:
        p = model.places(torch.arange(length))
        return h + p + (h[:, None] * p[None, None]).squeeze(1)

    program = check_pass(ReadPositions(), Model(mix), matches=2)
    assert program.ops()["llmc.embedding"] == 1


def test_one_user_is_rewritten_and_another_left_alone() -> None:
    def mix(model: Model, h: Tensor, length: int) -> Tensor:
        count = torch.arange(length)[:, None] * model.frequencies
        return (count.T @ h).sum(1, keepdim=True) + (h + count)

    program = check_pass(ReadPositions(), Model(mix), matches=1, there={"aten.arange"}, miss="batch dim")
    assert program.ops()["llmc.embedding"] == 1


def test_a_trained_table_stays_an_expression_and_others_are_constant() -> None:
    trained = check_pass(ReadPositions(), Model(FOUND["bart"][0]), matches=1)
    (table,) = (w for name, w in trained.weights.items() if name.startswith("tables."))
    assert [str(leaf) for leaf in table.leaves()] == ["places.weight"]
    computed = check_pass(ReadPositions(), Model(FOUND["moss"][0]), matches=1)
    assert all(w.is_constant for name, w in computed.weights.items() if name.startswith("tables."))


LEFT: dict[str, tuple[Mix, str | None]] = {
    "1. token types": (lambda m, h, s: h + m.places(torch.zeros(h.shape[:2], dtype=torch.int64)), None),
    "1. a mask of ones": (lambda m, h, s: h * torch.ones(h.shape[:2])[..., None], None),
    "1. a constant": (lambda m, h, s: h * m.frequencies.cos(), None),
    "2. a causal mask": (lambda m, h, s: torch.ones(s, s).tril() @ h, "exactly one dim"),
    "2. distances": (
        lambda m, h, s: torch.where(torch.arange(s)[:, None] >= torch.arange(s), h @ h.transpose(1, 2), 0.0) @ h,
        "exactly one dim",
    ),
    "2. the length": (lambda m, h, s: h * torch.arange(s).max(), "depends on the length"),
    "3. counted from the end": (lambda m, h, s: h + m.places(torch.arange(s).flip(0)), "depends on the length"),
    "3. a fraction of the length": (lambda m, h, s: h * (torch.arange(s) / s)[:, None], "depends on the length"),
    "4. too few table entries": (
        lambda m, h, s: h + m.places(torch.arange(s) + 8),
        "every position below 32",
    ),
    "4. complex numbers": (
        lambda m, h, s: torch.view_as_real(
            torch.view_as_complex(h.unflatten(2, (4, 2)))
            * torch.polar(torch.ones(s, 1), torch.arange(s)[:, None] * 1.0)
        ).flatten(2),
        "complex",
    ),
    "5. an index": (lambda m, h, s: h.index_select(1, torch.arange(s)), "batch dim of"),
    "5. of the keys": (
        lambda m, h, s: (h @ h.transpose(1, 2) + torch.arange(s)) @ h,
        "batch dim of",
    ),
    "5. multiplied as a matrix": (
        lambda m, h, s: torch.arange(s)[None].float() @ h + h,
        "batch dim of",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    mix, reason = LEFT[name]
    check_pass(ReadPositions(), Model(mix), matches=0, miss=reason)


def test_positions_of_the_program_are_left_alone() -> None:
    class WithPositions(Model):
        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            return self.head(self.embed(tokens) + self.places(positions))

    program = capture(WithPositions(lambda m, h, s: h))
    before = str(program)
    assert ReadPositions()(program).matches == 0
    assert str(program) == before


# One model for each way to count: whether its logits change if all positions are shifted. With rotary embeddings they
# do not.
ZOO = {
    "bart": True, "bigbird_pegasus": True, "blenderbot": True, "llama4_text": True, "marian": True, "musicgen": True,
    "mvp": True, "pegasus": True, "roformer": True, "trocr": True, "whisper": True, "moss_transcribe_diarize": False,
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_models_that_count_positions_by_themselves(name: str) -> None:
    model = tiny_model(name)
    program = llmc.capture(model, max_seq_len=32, until=Stage.OPTIMIZED)
    tokens = torch.randint(5, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).repeat(2, 1)
    logits = program(tokens, positions)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, atol=1e-5, rtol=0)
    shifted = program(tokens, positions + torch.tensor([[0], [5]]))
    torch.testing.assert_close(shifted[0], logits[0], atol=1e-5, rtol=0)
    assert (float((shifted[1] - logits[1]).abs().max()) > 1e-3) == ZOO[name]
