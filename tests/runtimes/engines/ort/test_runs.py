"""Batches are split into few runs, and each logit finds its place."""

from __future__ import annotations

import numpy as np

from llmc.runtimes.engines.batch import Batch, NewTokens
from llmc.runtimes.engines.ort.runs import plan_runs


def shapes(batch: Batch, longest: int = 256) -> list[tuple[tuple[int, ...], int, list[int]]]:
    return [(run.tokens.shape, run.slot, run.starts.tolist()) for run in plan_runs(batch, longest)]


def step(*slots: int) -> Batch:
    starts = np.arange(len(slots)) + 5
    return Batch.step(np.arange(len(slots)), starts, np.array(slots))


def test_adjacent_slots_share_a_run_in_any_order() -> None:
    assert shapes(step(2, 0, 1)) == [((3, 1), 0, [6, 7, 5])]
    assert shapes(step(4, 0, 1, 5)) == [((2, 1), 0, [6, 7]), ((2, 1), 4, [5, 8])]


def test_several_tokens_have_runs_of_their_own() -> None:
    batch = Batch.of(NewTokens([1, 2, 3, 4, 5], 7, 1), NewTokens([6], 9, 0), NewTokens([8], 3, 2))
    assert shapes(batch, longest=2) == [
        ((1, 1), 0, [9]),
        ((1, 1), 2, [3]),
        ((1, 2), 1, [7]),
        ((1, 2), 1, [9]),
        ((1, 1), 1, [11]),
    ]


def test_every_wanted_token_is_computed_once_and_in_its_place() -> None:
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
        for run in plan_runs(batch, longest=3):
            seen += run.tokens.reshape(-1).tolist()
            values = run.tokens[:, run.wanted].reshape(-1)
            found[run.target[run.target >= 0]] = values[run.target >= 0]
        assert sorted(seen) == list(range(len(batch.tokens)))
        assert found.tolist() == batch.wanted.tolist()
