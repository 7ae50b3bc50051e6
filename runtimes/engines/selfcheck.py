"""Compare an engine with reference logits of the model: the numeric part of the gate, which needs no compiler.

The reference is a file of the artifact, so the check works wherever the artifact runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from ...errors import LlmcError
from .base import Engine
from .batch import Batch, NewTokens

REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Limits:
    """The largest errors that the gate accepts.

    An error is the root mean square of the difference of logits, divided by the standard deviation of the logits.

    Attributes:
        model: the error against the model itself.
        rounded: the error against the program before lowering, with the same quantized weights, keys and values, but
            without a cache.
    """

    model: float
    rounded: float


# A wrong mask, position, scale or layout causes an error of 0.1 to 1.4. Quantizing the weights of a small model can
# cause almost as much. So an artifact with quantized weights is also compared with a program with the same weights, and
# there the limit is closer.
LIMITS = {
    # Sums in another order cause 1e-6, in deep models 1e-5.
    "fp32": Limits(model=2e-4, rounded=2e-4),
    # Every result is rounded to 11 bits (fp16) or 8 bits (bf16). That causes up to 0.0014 and 0.013. Where it changes
    # the experts of a token, it causes up to 0.02 in fp16. In bf16 it can cause as much as a mistake does, in a small
    # model with few experts, and such a model is refused.
    "fp16": Limits(model=0.05, rounded=0.05),
    "bf16": Limits(model=0.1, rounded=0.1),
    # Weights are off by 0.4% of the largest in their output channel. Kernels also quantize the inputs to int8, by block
    # or by token.
    "int8": Limits(model=0.3, rounded=0.3),
    "w8a8": Limits(model=0.3, rounded=0.15),
    # Weights are off by 7% of the largest in their group. The user must measure the effect on a small model.
    "int4": Limits(model=0.9, rounded=0.3),
    "nf4": Limits(model=0.9, rounded=0.15),
    # Weights and inputs are off by 3% of themselves, in the graph as in the program. Only the LM head's kernel differs.
    "fp8": Limits(model=0.3, rounded=0.15),
}
# Limits for an 8-bit cache; the wider of the two limits applies. Keys and values are off by 0.4% of the largest of
# their head (int8) or 3% of themselves (fp8), which causes errors of up to 0.011 and 0.046 in small models. Against the
# program with a quantized cache, errors are as small as without quantization, unless a sum in another order rounds a
# number to another code.
CACHE_LIMITS = {
    "int8": Limits(model=0.05, rounded=0.01),
    "fp8": Limits(model=0.15, rounded=0.03),
}
LIMITS |= {
    f"{precision}, {codes} cache": Limits(max(limits.model, more.model), max(limits.rounded, more.rounded))
    for precision, limits in LIMITS.items()
    for codes, more in CACHE_LIMITS.items()
}
# A pruned model is a different model by design. The user must measure the effect; only logits that exploded are refused
# (unrelated logits are off by 1.4). Against the pruned program before lowering, the limit is the same as for any model.
LIMITS |= {f"pruned {precision}": replace(limits, model=2.0) for precision, limits in LIMITS.items()}


def limits_key(precision: str, pruned: bool, cache: str | None = None) -> str:
    """Return the key of `LIMITS` for a precision of weights and of the cache.

    Args:
        cache: "int8" or "fp8"; None if the cache is not quantized.
    """
    key = precision if cache is None else f"{precision}, {cache} cache"
    return f"pruned {key}" if pruned else key


@dataclass(frozen=True)
class GateReference:
    """Logits of a model for some sequences and some token ids.

    Attributes:
        precision: the key of the limits in `LIMITS`.
        tokens: int64 [B, L], sequences padded with zeros.
        prompts: int64 [B], the number of tokens of each prompt.
        steps: the number of tokens that follow each prompt, decoded one by one.
        ids: int64 [B, L, K], the token ids that are compared, most probable first.
        logits: float32 [B, L, K], logits of the model itself.
        rounded: float32 [B, L, K], logits of the program with the same quantized weights, keys and values; [0] if
            nothing is quantized.
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
                f"{folder} was compiled with --no-verify, so it contains no reference logits.",
                "Compare with the model: llmc verify DIR MODEL",
            ) from None


@dataclass(frozen=True)
class Check:
    """The error of one way to run the engine, and its limit."""

    name: str
    measured: float
    limit: float

    @property
    def ok(self) -> bool:
        return bool(self.measured <= self.limit)  # False for NaN


@dataclass(frozen=True)
class GateReport:
    """The result of the gate.

    Attributes:
        tokens: the number of compared tokens.
    """

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
    """Run the sequences of the reference in each way that a server would, and measure the errors."""
    limits = LIMITS[str(reference.precision)]
    checks, tokens = [], 0
    for name, parts in _runs(engine, reference).items():
        errors = np.concatenate(list(parts), 0)
        tokens += len(errors)
        checks.append(Check(name, _round(np.sqrt(errors[:, 0].mean())), limits.model))
        if reference.rounded.ndim > 1:
            checks.append(Check(f"{name}, rounded alike", _round(np.sqrt(errors[:, 1].mean())), limits.rounded))
    return GateReport(str(reference.precision), tokens, checks)


def _round(value: float) -> float:
    """Round to three digits; the others differ from run to run."""
    return float(f"{value:.3g}")


def _runs(engine: Engine, reference: GateReference) -> dict[str, Iterator[np.ndarray]]:
    """Return, for each way to run, the squared errors of each token against the model and the quantized program."""
    tokens, prompts, steps = reference.tokens, reference.prompts, int(reference.steps)
    count = len(tokens)
    engine.open_slots(count)

    def prefill() -> Iterator[np.ndarray]:
        for index in range(count):
            size = prompts[index]
            logits = engine.forward(Batch.one(tokens[index, :size], slot=index)).numpy()
            yield _compare(logits, reference, np.full(size, index), np.arange(size))

    def decode() -> Iterator[np.ndarray]:
        sequences = np.arange(count)
        for step in range(steps):
            at = prompts + step
            logits = engine.forward(Batch.step(tokens[sequences, at], at)).numpy()
            yield _compare(logits, reference, sequences, at)

    def chunks() -> Iterator[np.ndarray]:
        """Run the longest prompt in chunks of different sizes, in a slot that held another sequence."""
        longest = int(prompts.argmax())
        length = int(prompts[longest])
        start, size = 0, max(1, length // 3)
        while start < length:
            end = min(start + size, length)
            logits = engine.forward(Batch.one(tokens[longest, start:end], start, logits="last")).numpy()
            yield _compare(logits, reference, np.array([longest]), np.array([end - 1]))
            start, size = end, size + 1

    def together() -> Iterator[np.ndarray]:
        """Run the longest prompt in pieces, each together with one token of every other sequence."""
        longest = int(prompts.argmax())
        others = [index for index in range(count) if index != longest]
        length = int(prompts[longest])
        cuts = np.linspace(0, length, min(steps, length) + 1).astype(int).tolist()
        for at, (start, end) in enumerate(itertools.pairwise(cuts)):
            parts = [NewTokens(tokens[index, at : at + 1], at, index) for index in others]
            piece = NewTokens(tokens[longest, start:end], start, longest)
            logits = engine.forward(Batch.of(*parts, piece)).numpy()
            yield _compare(logits, reference, np.array([*others, longest]), np.array([*[at] * len(others), end - 1]))

    return {
        "prompts": prefill(),
        "a ragged batch, token by token": decode(),
        "a prompt in pieces": chunks(),
        "pieces beside other sequences": together(),
    }


def _compare(logits: np.ndarray, reference: GateReference, sequences: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the squared errors [N, 2] of logits [N, V] of N tokens.

    Args:
        sequences: the index of each token's sequence.
        at: the position of each token.
    """
    ids = reference.ids[sequences, at]
    got = _centred(np.take_along_axis(logits, ids, 1))
    errors = []
    for wanted in (reference.logits, reference.rounded):
        if wanted.ndim > 1:
            value = _centred(wanted[sequences, at])
            errors.append(np.square(got - value).mean(1) / np.maximum(np.square(value).mean(1), 1e-30))
    return np.stack(errors, 1)


def _centred(logits: np.ndarray) -> np.ndarray:
    """Subtract the mean of each token's logits; a constant added to them does not change probabilities."""
    return logits - logits.mean(1, keepdims=True)
