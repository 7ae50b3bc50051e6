"""Split a batch into the session runs that compute it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..batch import Batch


@dataclass(frozen=True)
class Run:
    """New tokens that one session run computes: equally many of each of its sequences.

    Attributes:
        tokens: int64 [B, S], the indices of the tokens in the batch.
        starts: int64 [B], the number of positions that each sequence holds before the run.
        slot: the first of B adjacent slots.
        wanted: int64, the indices in the run's tokens of a sequence (0 to S-1) whose logits are returned.
        target: the indices of the wanted tokens of all sequences in the batch's `wanted`, in the order [B, W].
    """

    tokens: np.ndarray
    starts: np.ndarray
    slot: int
    wanted: np.ndarray
    target: np.ndarray


def plan_runs(batch: Batch, longest: int) -> list[Run]:
    """Return the runs of a batch, in order.

    Sequences with one new token that are in adjacent slots share a run, in any order within the batch. A sequence with
    several new tokens gets runs of its own: the fused attention doesn't support a batch of them.

    Args:
        longest: the most tokens of a run; longer sequences are cut.
    """
    firsts = batch.lengths.cumsum() - batch.lengths
    single = np.flatnonzero(batch.lengths == 1)
    single = single[np.argsort(batch.slots[single])]
    places = np.full(len(batch.tokens), -1)
    places[batch.wanted] = np.arange(len(batch.wanted))
    runs = []
    for entries in np.split(single, np.flatnonzero(np.diff(batch.slots[single]) != 1) + 1):
        if len(entries):
            tokens = firsts[entries]
            runs.append(_run(tokens[:, None], batch.starts[entries], int(batch.slots[entries[0]]), places))
    for entry in np.flatnonzero(batch.lengths > 1):
        first, length = int(firsts[entry]), int(batch.lengths[entry])
        for done in range(0, length, longest):
            tokens = np.arange(first + done, first + min(done + longest, length))
            runs.append(_run(tokens[None], batch.starts[entry : entry + 1] + done, int(batch.slots[entry]), places))
    return runs


def _run(tokens: np.ndarray, starts: np.ndarray, slot: int, places: np.ndarray) -> Run:
    found = places[tokens]
    wanted = np.flatnonzero((found >= 0).any(0))
    return Run(tokens, starts, slot, wanted, found[:, wanted].reshape(-1))
