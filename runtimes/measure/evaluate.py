"""Perplexity of an engine on a text, and its divergence from a reference.

Scores of neighbouring tokens are correlated, so standard errors treat the windows of the text as independent, not the
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ...errors import LlmcError
from ..engines.base import Engine
from ..engines.batch import Batch
from .windows import Window

BINS = 16
# Number of logits that are converted to float64 at once. Temporaries then fit into the CPU cache for any vocabulary.
_CHUNK = 1 << 18


class ReferencePredictions(Protocol):
    """Predictions of another engine, or of the model itself, for the same windows."""

    vocab_size: int

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the predictions of a window; valid until the next call.

        Returns:
            Logits [N, V] of the N scored tokens, up to a constant per token; and, if these logits are rounded, the
            exact log probabilities [N] of the target tokens, else None.
        """
        ...


class EngineReference:
    """Uses an engine as the reference, run window by window."""

    def __init__(self, engine: Engine, windows: Sequence[Window]) -> None:
        self.engine, self.windows, self.vocab_size = engine, windows, engine.spec.vocab_size
        engine.open_slots(1)

    def window(self, index: int) -> tuple[np.ndarray, None]:
        return window_logits(self.engine, self.windows[index]), None


@dataclass(frozen=True)
class Estimate:
    """A mean, or a function of one, and its standard error (None for one window)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class KlDivergence:
    """KL divergence of an engine from its reference over the scored tokens, in nats."""

    mean: float
    stderr: float | None
    median: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class ProbabilityChange:
    """Probability of the target token minus the reference's probability of it."""

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
    """Scores of the scored tokens, in the order of the text; all arrays are [tokens].

    Attributes:
        window: index of the token's window.
        position: number of tokens before it in its window.
        nll: negative log likelihood.
        reference_nll: the reference's negative log likelihood.
        kld: KL divergence of the predicted distribution from the reference's.
        rank: number of tokens that the engine finds more probable than the reference's best token.
    """

    window: np.ndarray
    position: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray | None = None
    kld: np.ndarray | None = None
    rank: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Statistics of an evaluation; only perplexity is set without a reference."""

    scores: Scores
    perplexity: Estimate
    ratio: Estimate | None
    kld: KlDivergence | None
    same_top1: Estimate | None
    same_top5: Estimate | None
    probability_change: ProbabilityChange | None

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return len(self.scores.nll)

    @property
    def windows(self) -> int:
        """Number of windows with scored tokens."""
        return len(np.unique(self.scores.window))

    def by_position(self) -> list[dict[str, Any]]:
        """Return the mean divergence in up to `BINS` ranges of positions [from, to).

        Ranges without scored tokens are left out.
        """
        position, kld = self.scores.position, self.scores.kld
        if kld is None:
            return []
        edges = np.unique(np.linspace(0, position.max() + 1, BINS + 1).astype(int))
        ranges = []
        for start, stop in pairwise(edges):
            inside = kld[(position >= start) & (position < stop)]
            if len(inside):
                ranges.append({"from": int(start), "to": int(stop), "tokens": len(inside), "kld": float(inside.mean())})
        return ranges

    def as_dict(self) -> dict[str, Any]:
        """Return the measurements in the layout of `llmc eval --json`."""
        parts = ("perplexity", "ratio", "kld", "same_top1", "same_top5", "probability_change")
        measured = {name: getattr(self, name) for name in parts}
        document: dict[str, Any] = {name: asdict(part) if part else None for name, part in measured.items()}
        return document | {"tokens": self.tokens, "windows": self.windows}


def window_logits(engine: Engine, window: Window) -> np.ndarray:
    """Run a window; return the logits [N, V] of its N scored tokens.

    They are valid until the engine's next call.
    """
    batch = Batch.one(window.tokens[:-1])
    return engine.forward(replace(batch, wanted=batch.wanted[window.first - 1 :])).numpy()


def evaluate(
    engine: Engine,
    windows: Sequence[Window],
    reference: ReferencePredictions | None = None,
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Evaluation:
    """Measure an engine on windows of a text; one window's logits are in memory.

    Args:
        reference: predictions for the same windows, to compare with.
        watch: called with "evaluate", the number of finished windows and the number of all windows.

    Raises:
        LlmcError: REFERENCE_MISMATCH if the vocabulary sizes differ; LOGITS_NOT_FINITE if a score is not finite.
    """
    if reference is not None and reference.vocab_size != engine.spec.vocab_size:
        raise LlmcError(
            "REFERENCE_MISMATCH",
            f"The reference has a vocabulary of {reference.vocab_size} tokens, the artifact of "
            f"{engine.spec.vocab_size}.",
            "Give the model that the artifact was compiled from, or another artifact of that model.",
        )
    engine.open_slots(1)
    parts: list[Scores] = []
    for i, window in enumerate(windows):
        watch("evaluate", i, len(windows))
        predictions = None if reference is None else reference.window(i)
        parts.append(_score(i, window, window_logits(engine, window), predictions))
    watch("evaluate", len(windows), len(windows))
    return summarise(_concatenate(parts))


def summarise(scores: Scores) -> Evaluation:
    """Compute the statistics of scores."""

    def mean(values: np.ndarray) -> Estimate:
        return mean_by_block(values, scores.window)

    perplexity = _exponential(mean(scores.nll))
    if scores.kld is None or scores.reference_nll is None or scores.rank is None:
        return Evaluation(scores, perplexity, None, None, None, None, None)
    kld = mean(scores.kld)
    percentiles = np.percentile(scores.kld, [50, 90, 99, 100])
    change = np.exp(-scores.nll) - np.exp(-scores.reference_nll)
    shift = mean(change)
    return Evaluation(
        scores,
        perplexity,
        # Paired differences: the difficulty of a passage affects both and cancels.
        ratio=_exponential(mean(scores.nll - scores.reference_nll)),
        kld=KlDivergence(kld.value, kld.stderr, *map(float, percentiles)),
        same_top1=mean(scores.rank < 1),
        same_top5=mean(scores.rank < 5),
        probability_change=ProbabilityChange(
            shift.value,
            shift.stderr,
            float(np.sqrt(np.square(change).mean())),
            *map(float, np.percentile(change, [1, 5, 10, 90, 95, 99])),
        ),
    )


def mean_by_block(values: np.ndarray, blocks: np.ndarray) -> Estimate:
    """Mean of all values, with the standard error for independent blocks.

    Values of one block may be correlated. Blocks may differ in size: the error is that of a ratio of two sums over
    blocks.
    """
    mean = float(np.mean(values, dtype=np.float64))
    sums = np.bincount(blocks, values - mean)[np.unique(blocks)]
    count = len(sums)
    if count < 2:
        return Estimate(mean, None)
    return Estimate(mean, float(np.sqrt(np.square(sums).sum() * count / (count - 1)) / len(values)))


def _exponential(mean: Estimate) -> Estimate:
    """Exponential of a mean; its error follows from the delta method."""
    value = float(np.exp(mean.value))
    return Estimate(value, None if mean.stderr is None else value * mean.stderr)


def _score(
    index: int, window: Window, logits: np.ndarray, reference: tuple[np.ndarray, np.ndarray | None] | None
) -> Scores:
    targets = window.targets
    position = window.first + np.arange(len(targets))
    nll, reference_nll, kld = np.empty((3, len(targets)))
    rank = np.empty(len(targets), np.int64)
    for chunk in chunks(*logits.shape):
        target = np.arange(len(targets[chunk])), targets[chunk]
        own = log_softmax(logits[chunk])
        nll[chunk] = -own[target]
        if reference is None:
            continue
        expected = log_softmax(reference[0][chunk])
        reference_nll[chunk] = -expected[target]
        best = expected.argmax(1)
        rank[chunk] = (own > np.take_along_axis(own, best[:, None], 1)).sum(1)
        probability = np.exp(expected)
        # A token of reference probability 0 adds nothing; subtracting would give NaN if both are -inf.
        ratio = np.subtract(expected, own, out=np.zeros_like(own), where=probability > 0)
        kld[chunk] = np.maximum((probability * ratio).sum(1), 0)  # rounding can leave -1e-17
    _check_finite(index, nll, *([] if reference is None else [reference_nll, kld]))
    blocks = np.full(len(targets), index)
    if reference is None:
        return Scores(blocks, position, nll)
    if reference[1] is not None:
        reference_nll = -np.asarray(reference[1], np.float64)
    return Scores(blocks, position, nll, reference_nll, kld, rank)


def chunks(tokens: int, width: int) -> Iterator[slice]:
    """Slices of `tokens` tokens with `width` logits each, to process in turn."""
    step = max(1, _CHUNK // width)
    return (slice(start, start + step) for start in range(0, tokens, step))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of logits [N, V], in float64."""
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits make NaN, which the scores show
        values -= values.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True))
    return values


def _check_finite(index: int, *measures: np.ndarray) -> None:
    if not all(np.isfinite(measure).all() for measure in measures):
        raise LlmcError(
            "LOGITS_NOT_FINITE",
            f"In window {index}, a logit is not a number, or a target token has probability 0.",
            "Check the artifact: llmc verify DIR",
        )


def _concatenate(parts: Sequence[Scores]) -> Scores:
    arrays = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Scores)}
    joined: dict[str, Any] = {name: np.concatenate(a) for name, a in arrays.items() if a[0] is not None}
    return Scores(**joined)
