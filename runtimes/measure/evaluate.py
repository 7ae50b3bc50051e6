"""How well an engine predicts a text, and how far its predictions are from those of another.

Scores of neighbouring tokens are not independent: every standard error is that of a mean over windows of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ...errors import LlmcError
from ..engines.base import Engine
from .windows import Window

BINS = 16
# Logits that are float64 at a time, so that temporaries stay in the processor's cache, whatever the vocabulary.
_CHUNK = 1 << 18


class ReferencePredictions(Protocol):
    """What another engine, or the model itself, gives for the same windows."""

    vocab_size: int

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [N, V] of the scored tokens, up to a number for each row; good until the next call.

        With them the exact log probabilities [N] of the tokens that came, where the logits are rounded.
        """
        ...


class EngineReference:
    """An engine as a reference, run window by window."""

    def __init__(self, engine: Engine, windows: Sequence[Window]) -> None:
        self.engine, self.windows, self.vocab_size = engine, windows, engine.vocab_size
        engine.open_slots(1)

    def window(self, index: int) -> tuple[np.ndarray, None]:
        return window_logits(self.engine, self.windows[index]), None


@dataclass(frozen=True)
class Estimate:
    """A mean, or what is made of one, and its standard error, which a single window doesn't tell."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class KlDivergence:
    """Kullback-Leibler divergence of an engine from its reference over the scored tokens, in nats."""

    mean: float
    stderr: float | None
    median: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Change:
    """By how much the probability of the token that came is larger than the reference has it."""

    mean: float
    stderr: float | None
    rms: float
    p1: float
    p5: float
    p10: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, eq=False)
class Scores:
    """Of each scored token, in the order of the text.

    Attributes:
        window: the index of its window.
        position: how many tokens stand before it in its window.
        nll: the negative log likelihood.
        reference_nll: that of the reference.
        kld: the divergence from the reference of all that was predicted in its place.
        rank: how many tokens the engine holds more probable than the one that is the reference's best.
    """

    window: np.ndarray
    position: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray | None = None
    kld: np.ndarray | None = None
    rank: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured; without a reference all but the perplexity is None."""

    scores: Scores
    perplexity: Estimate
    ratio: Estimate | None
    kld: KlDivergence | None
    same_top1: Estimate | None
    same_top5: Estimate | None
    probability_change: Change | None

    @property
    def tokens(self) -> int:
        """How many were scored."""
        return len(self.scores.nll)

    @property
    def windows(self) -> int:
        return len(np.unique(self.scores.window))

    def by_position(self) -> list[dict[str, Any]]:
        """The mean divergence in up to `BINS` ranges of positions [from, to), as far as tokens stand there."""
        position, kld = self.scores.position, self.scores.kld
        if kld is None:
            return []
        edges = np.unique(np.linspace(0, position.max() + 1, BINS + 1).astype(int))
        found = []
        for start, stop in pairwise(edges):
            inside = kld[(position >= start) & (position < stop)]
            if len(inside):
                found.append({"from": int(start), "to": int(stop), "tokens": len(inside), "kld": float(inside.mean())})
        return found

    def as_dict(self) -> dict[str, Any]:
        """The layout of `llmc eval --json`, without what only the verb knows."""
        parts = ("perplexity", "ratio", "kld", "same_top1", "same_top5", "probability_change")
        measured = {name: getattr(self, name) for name in parts}
        document: dict[str, Any] = {name: asdict(part) if part else None for name, part in measured.items()}
        return document | {"tokens": self.tokens, "windows": self.windows}


def window_logits(engine: Engine, window: Window) -> np.ndarray:
    """An engine's logits [N, V] for the scored tokens of a window; good until the next call."""
    logits = engine.forward(window.tokens[None, :-1], np.zeros(1, np.int64), np.zeros(1, np.int64))
    return logits[0, window.first - 1 :]


def evaluate(
    engine: Engine,
    windows: Sequence[Window],
    reference: ReferencePredictions | None = None,
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Evaluation:
    """Measure an engine on windows of a text; it holds the logits of one window at a time.

    Args:
        reference: what it is compared with, for the same windows.
        watch: told "evaluate", and how many windows are done.

    Raises:
        LlmcError: REFERENCE_MISMATCH for another vocabulary; LOGITS_NOT_FINITE where a measure is not a number.
    """
    if reference is not None and reference.vocab_size != engine.vocab_size:
        raise LlmcError(
            "REFERENCE_MISMATCH",
            f"The reference predicts {reference.vocab_size} tokens, the artifact {engine.vocab_size}.",
            "Give the model that the artifact was compiled from, or another artifact of it.",
        )
    engine.open_slots(1)
    parts: list[Scores] = []
    for i, window in enumerate(windows):
        watch("evaluate", i, len(windows))
        theirs = None if reference is None else reference.window(i)
        parts.append(_score(i, window, window_logits(engine, window), theirs))
    watch("evaluate", len(windows), len(windows))
    return summarise(_joined(parts))


def summarise(scores: Scores) -> Evaluation:
    """The statistics of scores."""

    def mean(values: np.ndarray) -> Estimate:
        return mean_by_block(values, scores.window)

    perplexity = _exponential(mean(scores.nll))
    if scores.kld is None or scores.reference_nll is None or scores.rank is None:
        return Evaluation(scores, perplexity, None, None, None, None, None)
    kld = mean(scores.kld)
    shape = np.percentile(scores.kld, [50, 90, 99, 100])
    change = np.exp(-scores.nll) - np.exp(-scores.reference_nll)
    shift = mean(change)
    return Evaluation(
        scores,
        perplexity,
        # Paired: what makes a passage hard is common to both and cancels.
        ratio=_exponential(mean(scores.nll - scores.reference_nll)),
        kld=KlDivergence(kld.value, kld.stderr, *map(float, shape)),
        same_top1=mean(scores.rank < 1),
        same_top5=mean(scores.rank < 5),
        probability_change=Change(
            shift.value,
            shift.stderr,
            float(np.sqrt(np.square(change).mean())),
            *map(float, np.percentile(change, [1, 5, 10, 90, 95, 99])),
        ),
    )


def mean_by_block(values: np.ndarray, blocks: np.ndarray) -> Estimate:
    """The mean of all values, and its standard error where blocks are independent but the values of one are not.

    Blocks may differ in size: the error is that of a ratio of two sums over blocks.
    """
    mean = float(np.mean(values, dtype=np.float64))
    sums = np.bincount(blocks, values - mean)[np.unique(blocks)]
    count = len(sums)
    if count < 2:
        return Estimate(mean, None)
    return Estimate(mean, float(np.sqrt(np.square(sums).sum() * count / (count - 1)) / len(values)))


def _exponential(mean: Estimate) -> Estimate:
    """e to the power of a mean; the error by the delta method."""
    value = float(np.exp(mean.value))
    return Estimate(value, None if mean.stderr is None else value * mean.stderr)


def _score(
    index: int, window: Window, logits: np.ndarray, reference: tuple[np.ndarray, np.ndarray | None] | None
) -> Scores:
    targets = window.targets
    position = window.first + np.arange(len(targets))
    nll, reference_nll, kld = np.empty((3, len(targets)))
    rank = np.empty(len(targets), np.int64)
    for rows in chunks(*logits.shape):
        token = np.arange(len(targets[rows])), targets[rows]
        own = log_softmax(logits[rows])
        nll[rows] = -own[token]
        if reference is None:
            continue
        theirs = log_softmax(reference[0][rows])
        reference_nll[rows] = -theirs[token]
        best = theirs.argmax(1)
        rank[rows] = (own > np.take_along_axis(own, best[:, None], 1)).sum(1)
        probability = np.exp(theirs)
        # What the reference excludes adds nothing, be it excluded here too.
        ratio = np.subtract(theirs, own, out=np.zeros_like(own), where=probability > 0)
        kld[rows] = np.maximum((probability * ratio).sum(1), 0)  # rounding may leave -1e-17
    _check_finite(index, nll, *([] if reference is None else [reference_nll, kld]))
    blocks = np.full(len(targets), index)
    if reference is None:
        return Scores(blocks, position, nll)
    if reference[1] is not None:
        reference_nll = -np.asarray(reference[1], np.float64)
    return Scores(blocks, position, nll, reference_nll, kld, rank)


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Pieces of so many rows of logits that are computed with at a time."""
    step = max(1, _CHUNK // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of each row, in float64."""
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite logits, which show in what is made of them
        values -= values.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True))
    return values


def _check_finite(index: int, *measures: np.ndarray) -> None:
    if not all(np.isfinite(measure).all() for measure in measures):
        raise LlmcError(
            "LOGITS_NOT_FINITE",
            f"In window {index} a logit is not a number, or a token that came has no probability at all.",
            "Verify the artifact: llmc verify DIR",
        )


def _joined(parts: Sequence[Scores]) -> Scores:
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Scores)}
    joined: dict[str, Any] = {name: np.concatenate(c) for name, c in columns.items() if c[0] is not None}
    return Scores(**joined)
