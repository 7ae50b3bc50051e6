"""How fast an engine is: prefill, decode and the latency that a user feels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...errors import LlmcError
from ..engines.base import Engine
from ..memory import peak_rss


@dataclass(frozen=True)
class Rate:
    """Tokens a second over the repetitions of a test, all sequences together."""

    test: str
    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Latency:
    """Percentiles in milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class BenchResult:
    """What was measured. A test that was left out has no rate, and no latency.

    Attributes:
        ttft_ms: from the beginning of a prompt's processing, behind those of the sequences before it, to its first
            logits.
        tpot_ms: one decode step.
        load_s: what loading took, where the caller measured it.
    """

    rates: tuple[Rate, ...]
    ttft_ms: Latency | None
    tpot_ms: Latency | None
    repeats: int
    concurrency: int
    peak_rss_bytes: int | None
    load_s: float | None = None
    threads: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The layout of `llmc bench --output-format json`."""
        results = [
            {"test": rate.test, "tokens_per_s": {"median": rate.median, "min": rate.min, "max": rate.max}}
            for rate in self.rates
        ]
        latencies = {"ttft_ms": self.ttft_ms, "tpot_ms": self.tpot_ms}
        return (
            {"results": results}
            | {name: asdict(latency) if latency else None for name, latency in latencies.items()}
            | self.conditions()
        )

    def conditions(self) -> dict[str, float | None]:
        """What all tests share."""
        return {
            "load_s": self.load_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "threads": self.threads,
            "repeats": self.repeats,
            "concurrency": self.concurrency,
        }


def bench(
    engine: Engine,
    prompt: int = 512,
    tokens: int = 128,
    repeats: int = 5,
    concurrency: int = 1,
    *,
    watch: Callable[[str, int, int], None] = lambda test, done, total: None,
) -> BenchResult:
    """Measure an engine as llama-bench does: random tokens, no sampling, each test warmed up once.

    The test `ppN` runs a prompt of N tokens into an empty cache, one sequence after the other. The test `tgN` takes N
    steps of one token from an empty cache, all sequences together.

    Args:
        prompt: tokens of the prefill test; 0 leaves it out.
        tokens: steps of the decode test; 0 leaves it out.
        concurrency: how many sequences.
        watch: told the test, and how many of its runs are done.

    Raises:
        LlmcError: BENCH_TOO_LONG if a test doesn't fit into the cache.
    """
    for test, length in (("prompt", prompt), ("decode test", tokens)):
        if length > engine.max_seq_len:
            raise LlmcError(
                "BENCH_TOO_LONG",
                f"The {test} of {length} tokens is longer than the {engine.max_seq_len} that the artifact serves.",
                "Measure fewer, or compile with a larger --max-seq-len.",
            )
    engine.open_slots(concurrency)
    random = np.random.default_rng(0)
    rates, ttft, tpot = [], None, None
    if prompt:
        rows = random.integers(0, engine.vocab_size, (concurrency, 1, prompt))
        runs = list(_runs(f"pp{prompt}", repeats, watch, lambda: _prefill(engine, rows)))
        rates.append(_rate(f"pp{prompt}", rows.size, runs))
        ttft = _latency(np.concatenate(runs))
    if tokens:
        steps = random.integers(0, engine.vocab_size, (tokens, concurrency, 1))
        runs = list(_runs(f"tg{tokens}", repeats, watch, lambda: _decode(engine, steps)))
        rates.append(_rate(f"tg{tokens}", steps.size, runs))
        tpot = _latency(np.concatenate([np.diff(run, prepend=0.0) for run in runs]))
    return BenchResult(tuple(rates), ttft, tpot, repeats, concurrency, peak_rss())


def _prefill(engine: Engine, rows: np.ndarray) -> Iterator[None]:
    start = np.zeros(1, np.int64)
    for slot, row in enumerate(rows):
        engine.forward(row, start, np.array([slot]), last_only=True)
        yield


def _decode(engine: Engine, steps: np.ndarray) -> Iterator[None]:
    starts = np.zeros(steps.shape[1], np.int64)
    for step in steps:
        engine.forward(step, starts, last_only=True)
        starts += 1
        yield


def _runs(
    test: str, repeats: int, watch: Callable[[str, int, int], None], run: Callable[[], Iterator[None]]
) -> Iterator[np.ndarray]:
    """Of each run, the seconds from its beginning to the end of each of its calls."""
    for done in range(repeats + 1):
        watch(test, done, repeats + 1)
        began = time.perf_counter()
        times = np.array([time.perf_counter() - began for _ in run()])
        if done:  # the first one warms up
            yield times


def _rate(test: str, tokens: int, runs: list[np.ndarray]) -> Rate:
    rates = [tokens / run[-1] for run in runs]
    return Rate(test, float(np.median(rates)), float(min(rates)), float(max(rates)))


def _latency(seconds: np.ndarray) -> Latency:
    return Latency(*(float(value) for value in np.percentile(seconds * 1000, [50, 95, 99])))
