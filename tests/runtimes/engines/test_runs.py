"""Batches are split into few runs, and each logit finds its place."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.runtimes.engines.batch import Batch, NewTokens, Wanted
from llmc.runtimes.engines.runs import plan_runs

Shape = tuple[tuple[int, ...], int, list[int], tuple[int, int] | None]


def shapes(batch: Batch, longest: int = 256, mixes: bool = False) -> list[Shape]:
    """The shape of each run's tokens, its first slot, the ends of its sequences, and the slot and end of its piece."""
    runs = plan_runs(batch, longest, mixes)
    pieces = [run.piece and (run.piece.slot, run.piece.end) for run in runs]
    return [(r.tokens.shape, r.slot, r.ends.tolist(), piece) for r, piece in zip(runs, pieces, strict=True)]


def step(*slots: int) -> Batch:
    starts = np.arange(len(slots)) + 5
    return Batch.step(np.arange(len(slots)), starts, np.array(slots))


def test_adjacent_slots_share_a_run_in_any_order() -> None:
    assert shapes(step(2, 0, 1)) == [((3, 1), 0, [7, 8, 6], None)]
    assert shapes(step(4, 0, 1, 5)) == [((2, 1), 0, [7, 8], None), ((2, 1), 4, [6, 9], None)]


MANY = Batch.of(NewTokens([1, 2, 3, 4, 5], 7, 1), NewTokens([6], 9, 0), NewTokens([8], 3, 2))


def test_several_tokens_have_runs_of_their_own() -> None:
    assert shapes(MANY, longest=2) == [
        ((1, 1), 0, [10], None),
        ((1, 1), 2, [4], None),
        ((1, 2), 1, [9], None),
        ((1, 2), 1, [11], None),
        ((1, 1), 1, [12], None),
    ]


@pytest.mark.parametrize("logits", ["all", "last", "none"])
def test_a_sequence_alone_has_one_run_up_to_the_longest(logits: Wanted) -> None:
    alone = Batch.one([4, 5, 6], 7, 2, logits)
    assert shapes(alone, longest=3) == [((1, 3), 2, [10], None)]
    assert shapes(alone, longest=2) == [((1, 2), 2, [9], None), ((1, 1), 2, [10], None)]
    (run,) = plan_runs(alone, longest=3)
    assert run.wanted.tolist() == {"all": [0, 1, 2], "last": [2], "none": []}[logits]
    assert run.target.tolist() == list(range(len(run.wanted))) and run.tokens.tolist() == [[0, 1, 2]]


def test_a_graph_that_mixes_joins_pieces_with_single_tokens() -> None:
    assert shapes(MANY, longest=2, mixes=True) == [
        ((1, 3), 0, [10], (1, 9)),
        ((1, 3), 2, [4], (1, 11)),
        ((1, 1), 1, [12], None),
    ]
    two = Batch.of(NewTokens([1, 2], 0, 2), NewTokens([3, 4, 5], 0, 3), NewTokens([6], 9, 1), NewTokens([8], 3, 0))
    assert shapes(two, mixes=True) == [((1, 4), 0, [4, 10], (2, 2)), ((1, 3), 3, [3], None)]
    assert [run.tokens_per_sequence for run in plan_runs(two, 256, mixes=True)] == [[1, 1, 2], [3]]


@pytest.mark.parametrize("mixes", [False, True])
def test_every_wanted_token_is_computed_once_and_in_its_place(mixes: bool) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        count = random.integers(1, 6)
        parts = [
            NewTokens(
                random.integers(0, 9, random.integers(1, 8)), 0, int(slot), random.choice(["all", "last", "none"])
            )
            for slot in random.permutation(8)[:count]
        ]
        batch = Batch.of(*parts)
        found = np.full(len(batch.wanted), -1)
        seen: list[int] = []
        for run in plan_runs(batch, longest=3, mixes=mixes):
            seen += run.tokens.reshape(-1).tolist()
            values = run.tokens[:, run.wanted].reshape(-1)
            found[run.target[run.target >= 0]] = values[run.target >= 0]
        assert sorted(seen) == list(range(len(batch.tokens)))
        assert found.tolist() == batch.wanted.tolist()
