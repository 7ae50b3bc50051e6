"""An engine held against what the model itself gave: the numeric half of the gate, which needs no compiler.

The reference travels with the artifact, so that `llmc verify` works wherever the artifact runs. Run as a module it
checks one artifact in a process of its own and prints the findings as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from ...errors import LlmcError
from ..engines.base import Engine
from ..engines.load import load
from ..memory import peak_rss

REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Limits:
    """How far an engine may be from what it was made from.

    An error is the root mean square of the difference of logits, relative to that of the logits around their mean.

    Attributes:
        model: the error against the model itself.
        rounded: the error against the same program with the same rounded weights, keys and values, before it was
            lowered and without a cache.
    """

    model: float
    rounded: float


# A wrong mask, position, scale or layout makes an error of 0.1 to 1.4. What rounding weights does to a small model
# comes near that, so an artifact with rounded weights is held against those same weights as well, much closer.
LIMITS = {
    # Sums in another order: 1e-6, in deep models 1e-5.
    "fp32": Limits(model=2e-4, rounded=2e-4),
    # Weights off by 0.4% of the largest in their row. Kernels round the inputs to int8 too, by block or by row.
    "int8": Limits(model=0.3, rounded=0.3),
    "w8a8": Limits(model=0.3, rounded=0.15),
    # Weights off by 7% of the largest in their group: how much a small model suffers is for the user to measure.
    "int4": Limits(model=0.9, rounded=0.3),
    "nf4": Limits(model=0.9, rounded=0.15),
    # Weights and inputs off by 3% of themselves, in the graph as in the program; only the head's kernel differs.
    "fp8": Limits(model=0.3, rounded=0.15),
}
# What a cache in 8 bits adds; of two limits the wider counts. Keys and values off by 0.4% of the largest of their head
# (int8) or 3% of themselves (fp8) make errors of up to 0.011 and 0.046 in small models. The rounded program is off by
# as much as an unrounded one, unless a sum in another order moves a number across the middle between two codes.
CACHE_LIMITS = {
    "int8": Limits(model=0.05, rounded=0.01),
    "fp8": Limits(model=0.15, rounded=0.03),
}
LIMITS |= {
    f"{precision}, {codes} cache": Limits(max(limits.model, more.model), max(limits.rounded, more.rounded))
    for precision, limits in LIMITS.items()
    for codes, more in CACHE_LIMITS.items()
}
# A pruned model is another model by design: what that costs is for the user to measure, and only numbers that blew up
# are refused (logits that have nothing to do with the model's are off by 1.4). It is held against itself, before it was
# lowered, as close as any other.
LIMITS |= {f"pruned {precision}": replace(limits, model=2.0) for precision, limits in LIMITS.items()}


def limits_row(precision: str, pruned: bool, cache: str | None = None) -> str:
    """The row of `LIMITS` for a precision of weights, and for what a cache is rounded to, if it is."""
    row = precision if cache is None else f"{precision}, {cache} cache"
    return f"pruned {row}" if pruned else row


@dataclass(frozen=True)
class GateReference:
    """What the model gives for some sequences, at some places of its vocabulary.

    Attributes:
        precision: the row of `LIMITS` that applies.
        tokens: int64 [R, L], rows filled up with zeros.
        prompts: int64 [R], tokens of a row that are its prompt; `steps` more follow, one by one.
        ids: int64 [R, L, K], where in the vocabulary, the most probable first.
        logits: float32 [R, L, K], the model's own.
        rounded: float32 [R, L, K], the program's over what is rounded alike; [0] where nothing is.
    """

    precision: np.ndarray
    tokens: np.ndarray
    prompts: np.ndarray
    steps: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    rounded: np.ndarray

    def save(self, folder: Path) -> None:
        np.savez(folder / REFERENCE, **asdict(self))

    @classmethod
    def read(cls, folder: Path) -> GateReference:
        try:
            with np.load(folder / REFERENCE, allow_pickle=False) as file:
                return cls(**{field.name: file[field.name] for field in fields(cls)})
        except FileNotFoundError:
            raise LlmcError(
                "REFERENCE_MISSING",
                f"{folder} was compiled with --no-verify: it holds nothing to compare with.",
                "Name the model too: llmc verify DIR MODEL",
            ) from None


@dataclass(frozen=True)
class Check:
    """One way of running the engine, how far it was off, and how far it may be."""

    name: str
    measured: float
    limit: float

    @property
    def ok(self) -> bool:
        return bool(self.measured <= self.limit)  # NaN is not


@dataclass(frozen=True)
class GateReport:
    """What the gate found."""

    precision: str
    tokens: int
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        checks = [asdict(check) | {"ok": check.ok} for check in self.checks]
        return {"passed": self.passed, "precision": self.precision, "tokens": self.tokens, "checks": checks}


def check(engine: Engine, reference: GateReference) -> GateReport:
    """Run the reference's sequences every way that a server would, and measure each."""
    limits = LIMITS[str(reference.precision)]
    checks, tokens = [], 0
    for name, parts in _runs(engine, reference).items():
        found = np.concatenate(list(parts), 0)
        tokens += len(found)
        checks.append(Check(name, _round(np.sqrt(found[:, 0].mean())), limits.model))
        if reference.rounded.ndim > 1:
            checks.append(Check(f"{name}, rounded alike", _round(np.sqrt(found[:, 1].mean())), limits.rounded))
    return GateReport(str(reference.precision), tokens, checks)


def _round(value: float) -> float:
    """Three digits: what comes behind them differs from run to run."""
    return float(f"{value:.3g}")


def _runs(engine: Engine, reference: GateReference) -> dict[str, Iterator[np.ndarray]]:
    """Each way of running: for each token the squared errors against the model and against the rounded program."""
    tokens, prompts, steps = reference.tokens, reference.prompts, int(reference.steps)
    count = len(tokens)
    engine.open_slots(count)

    def prefill() -> Iterator[np.ndarray]:
        for row in range(count):
            size = prompts[row]
            logits = engine.forward(tokens[row : row + 1, :size], np.zeros(1, np.int64), np.array([row]))
            yield _compare(logits[0], reference, np.full(size, row), np.arange(size))

    def decode() -> Iterator[np.ndarray]:
        rows = np.arange(count)
        for step in range(steps):
            at = prompts + step
            logits = engine.forward(tokens[rows, at][:, None], at, last_only=True)
            yield _compare(logits[:, 0], reference, rows, at)

    def chunks() -> Iterator[np.ndarray]:
        """The longest sequence, into a slot that holds another one, in pieces of uneven size."""
        row = int(prompts.argmax())
        start, size = 0, max(1, int(prompts[row]) // 3)
        while start < prompts[row]:
            end = min(start + size, int(prompts[row]))
            logits = engine.forward(tokens[row : row + 1, start:end], np.array([start]), np.array([0]), last_only=True)
            yield _compare(logits[0], reference, np.array([row]), np.array([end - 1]))
            start, size = end, size + 1

    return {"prompts": prefill(), "a ragged batch, token by token": decode(), "a prompt in pieces": chunks()}


def _compare(logits: np.ndarray, reference: GateReference, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[N, 2] for logits [N, V] of N tokens."""
    ids = reference.ids[rows, at]
    got = _centred(np.take_along_axis(logits, ids, 1))
    errors = []
    for wanted in (reference.logits, reference.rounded):
        if wanted.ndim > 1:
            value = _centred(wanted[rows, at])
            errors.append(np.square(got - value).mean(1) / np.maximum(np.square(value).mean(1), 1e-30))
    return np.stack(errors, 1)


def _centred(logits: np.ndarray) -> np.ndarray:
    """A number added to all logits of a token changes nothing."""
    return logits - logits.mean(1, keepdims=True)


def main() -> None:
    """`python -m llmc.runtimes.measure.selfcheck DIR`"""
    folder = Path(sys.argv[1])
    try:
        report = check(load(folder, check_files=False), GateReference.read(folder))
        document = report.as_dict() | {"peak_rss_bytes": peak_rss()}
    except LlmcError as error:
        document = {"error": {"code": error.code, "what": error.what, "hint": error.hint}}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
