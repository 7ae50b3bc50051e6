"""Split a batch into the graph runs that compute it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .batch import Batch


@dataclass(frozen=True)
class Run:
    """New tokens that one graph run computes: equally many of each of its sequences, or a row with a piece.

    Attributes:
        tokens: int64 [B, S], the indices of the tokens in the batch. With a piece [1, N]: one token of each sequence,
            then those of the piece.
        ends: int64 [B], the number of positions that each sequence but the piece's holds after the run.
        slot: the first of their adjacent slots.
        wanted: int64, the indices in the run's tokens of a sequence (0 to S-1) whose logits are returned.
        target: the indices of the wanted tokens of all sequences in the batch's `wanted`, in the order [B, W]; -1: the
            batch doesn't want it.
        piece: several tokens of one more sequence.
    """

    tokens: np.ndarray
    ends: np.ndarray
    slot: int
    wanted: np.ndarray
    target: np.ndarray
    piece: Piece | None = None

    @property
    def tokens_per_sequence(self) -> list[int]:
        """The number of new tokens of each sequence."""
        if self.piece is None:
            return [self.tokens.shape[1]] * len(self.ends)
        return [1] * len(self.ends) + [self.tokens.shape[1] - len(self.ends)]


@dataclass(frozen=True)
class Piece:
    """The slot of a piece's sequence, and the number of positions that it holds after the run."""

    slot: int
    end: int


def plan_runs(batch: Batch, longest: int, mixes: bool = False) -> list[Run]:
    """Return the runs of a batch, in order.

    Sequences with one new token that are in adjacent slots share a run, in any order within the batch. A sequence with
    several new tokens gets runs of its own, since the fused attention doesn't support a batch of them; if the graph
    mixes, each is joined with a run of the others.

    Args:
        longest: the most tokens of a sequence in a run; longer sequences are cut.
    """
    count = len(batch.tokens)
    if len(batch.lengths) == 1 and count <= longest:
        wanted = batch.wanted
        return [Run(np.arange(count)[None], batch.starts + count, int(batch.slots[0]), wanted, np.arange(len(wanted)))]
    places = np.full(count, -1)
    places[batch.wanted] = np.arange(len(batch.wanted))
    steps, pieces = _steps(batch, places), _pieces(batch, places, longest)
    joined = min(len(steps), len(pieces)) if mixes else 0
    mixed = [_mixed(step, piece, places) for step, piece in zip(steps[:joined], pieces[:joined], strict=True)]
    return [*mixed, *steps[joined:], *pieces[joined:]]


def _steps(batch: Batch, places: np.ndarray) -> list[Run]:
    firsts = batch.lengths.cumsum() - batch.lengths
    single = np.flatnonzero(batch.lengths == 1)
    single = single[np.argsort(batch.slots[single])]
    groups = np.split(single, np.flatnonzero(np.diff(batch.slots[single]) != 1) + 1)
    return [
        _run(firsts[entries][:, None], batch.starts[entries] + 1, int(batch.slots[entries[0]]), places)
        for entries in groups
        if len(entries)
    ]


def _pieces(batch: Batch, places: np.ndarray, longest: int) -> list[Run]:
    firsts, runs = batch.lengths.cumsum() - batch.lengths, []
    for entry in np.flatnonzero(batch.lengths > 1):
        first, length = int(firsts[entry]), int(batch.lengths[entry])
        for done in range(0, length, longest):
            end = min(done + longest, length)
            tokens = np.arange(first + done, first + end)[None]
            runs.append(_run(tokens, batch.starts[entry : entry + 1] + end, int(batch.slots[entry]), places))
    return runs


def _mixed(step: Run, piece: Run, places: np.ndarray) -> Run:
    tokens = np.concatenate([step.tokens[:, 0], piece.tokens[0]])[None]
    return replace(_run(tokens, step.ends, step.slot, places), piece=Piece(piece.slot, int(piece.ends[0])))


def _run(tokens: np.ndarray, ends: np.ndarray, slot: int, places: np.ndarray) -> Run:
    found = places[tokens]
    wanted = np.flatnonzero((found >= 0).any(0))
    return Run(tokens, ends, slot, wanted, found[:, wanted].reshape(-1))
