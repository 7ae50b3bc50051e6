"""Measure the speed of an engine: prefill, decode, latency, and on request the time by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...errors import UsageError
from ..engines.base import Engine, KernelTime, Profiles
from ..engines.batch import Batch
from ..memory import peak_rss

# Steps of the decode test that warm a profiled engine up.
_WARM_STEPS = 4


@dataclass(frozen=True)
class Rate:
    """Tokens a second over the repetitions of a test, all sequences together."""

    test: str
    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Latency:
    """Percentiles in milliseconds; None where there are too few samples for one."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: np.ndarray) -> Latency:
        """Return the percentiles of samples: 95 from 20 of them on, 99 from 100 on."""
        needed = {50: 1, 95: 20, 99: 100}
        return cls(*(float(np.percentile(seconds * 1000, p)) if len(seconds) >= n else None for p, n in needed.items()))


@dataclass(frozen=True)
class KernelProfile:
    """Time by kernel of one run of a test, the longest first."""

    test: str
    kernels: tuple[KernelTime, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each kernel in the time of all of them."""
        total = sum(kernel.ms for kernel in self.kernels)
        return tuple(kernel.ms / total if total else 0.0 for kernel in self.kernels)

    def as_dict(self) -> dict[str, Any]:
        """Return its layout in `BenchResult.as_dict`."""
        kernels = zip(self.kernels, self.shares, strict=True)
        return {"test": self.test, "kernels": [asdict(kernel) | {"share": share} for kernel, share in kernels]}


@dataclass(frozen=True)
class BenchResult:
    """Measured speed. A test that was left out has no rate and no latency.

    Attributes:
        ttft_ms: time to the first logits of a prompt; it begins when the prompts before it are done.
        tpot_ms: time of one decode step.
        load_s: time to load the engine, if the caller measured it.
        profiles: time by kernel of each test, if that was requested.
    """

    rates: tuple[Rate, ...]
    ttft_ms: Latency | None
    tpot_ms: Latency | None
    repeats: int
    concurrency: int
    peak_rss_bytes: int | None
    load_s: float | None = None
    threads: int | None = None
    profiles: tuple[KernelProfile, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the document of `llmc bench --output-format json`."""
        results = [
            {"test": rate.test, "tokens_per_s": {"median": rate.median, "min": rate.min, "max": rate.max}}
            for rate in self.rates
        ]
        latencies = {"ttft_ms": self.ttft_ms, "tpot_ms": self.tpot_ms}
        return (
            {"results": results}
            | {name: asdict(latency) if latency else None for name, latency in latencies.items()}
            | self.conditions()
            | ({"profile": [profile.as_dict() for profile in self.profiles]} if self.profiles else {})
        )

    def conditions(self) -> dict[str, float | None]:
        """Return the facts that all tests share."""
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
    profile: bool = False,
    watch: Callable[[str, int, int], None] = lambda test, done, total: None,
) -> BenchResult:
    """Measure an engine as llama-bench does: random tokens, no sampling, each test warmed up once.

    The test `ppN` runs a prompt of N tokens into an empty cache, one sequence after the other. The test `tgN` takes N
    steps of one token from an empty cache, all sequences together.

    Args:
        prompt: tokens of the prefill test; 0 leaves it out.
        tokens: steps of the decode test; 0 leaves it out.
        concurrency: number of sequences.
        profile: run each test once more under the engine's profiler.
        watch: called with the test, the number of its runs that are done and the number of all.

    Raises:
        LlmcError: BENCH_TOO_LONG if a test doesn't fit into the cache.
        UsageError: PROFILE_UNSUPPORTED if the engine has no profiler, PROFILE_TOO_LONG if it can't record a test.
    """
    if profile:
        _check_profiles(engine)
    for test, length in (("prompt", prompt), ("decode test", tokens)):
        if length > engine.spec.max_seq_len:
            raise UsageError(
                "BENCH_TOO_LONG",
                f"The {test} has {length} tokens, but the artifact serves at most {engine.spec.max_seq_len}.",
                "Measure fewer tokens, or compile with a larger --max-seq-len.",
            )
    engine.open_slots(concurrency)
    random = np.random.default_rng(0)
    prompts = random.integers(0, engine.spec.vocab_size, (concurrency, prompt))
    steps = random.integers(0, engine.spec.vocab_size, (tokens, concurrency))
    rates, ttft, tpot = [], None, None
    if prompt:
        runs = list(_runs(f"pp{prompt}", repeats, watch, lambda: _prefill(engine, prompts)))
        rates.append(_rate(f"pp{prompt}", prompts.size, runs))
        ttft = Latency.of(np.concatenate(runs))
    if tokens:
        runs = list(_runs(f"tg{tokens}", repeats, watch, lambda: _decode(engine, steps)))
        rates.append(_rate(f"tg{tokens}", steps.size, runs))
        tpot = Latency.of(np.concatenate([np.diff(run, prepend=0.0) for run in runs]))
    peak = peak_rss()
    profiles = tuple(_profiles(engine, prompts, steps, watch)) if profile else ()
    return BenchResult(tuple(rates), ttft, tpot, repeats, concurrency, peak, profiles=profiles)


def _prefill(engine: Engine, prompts: np.ndarray) -> Iterator[None]:
    for slot, prompt in enumerate(prompts):
        engine.forward(Batch.one(prompt, slot=slot, logits="last"))
        yield


def _decode(engine: Engine, steps: np.ndarray) -> Iterator[None]:
    starts = np.zeros(steps.shape[1], np.int64)
    for step in steps:
        engine.forward(Batch.step(step, starts))
        starts += 1
        yield


def _runs(
    test: str, repeats: int, watch: Callable[[str, int, int], None], run: Callable[[], Iterator[None]]
) -> Iterator[np.ndarray]:
    """Run a test repeatedly; yield the seconds from the start of each run to the end of each of its calls."""
    for done in range(repeats + 1):
        watch(test, done, repeats + 1)
        began = time.perf_counter()
        times = np.array([time.perf_counter() - began for _ in run()])
        if done:  # the first run is a warm-up
            yield times


def _check_profiles(engine: Engine) -> Profiles:
    if not isinstance(engine, Profiles):
        raise UsageError(
            "PROFILE_UNSUPPORTED", "The engine of this artifact can't measure time by kernel.", "Leave out --profile."
        )
    return engine


def _profiles(
    engine: Engine, prompts: np.ndarray, steps: np.ndarray, watch: Callable[[str, int, int], None]
) -> Iterator[KernelProfile]:
    profiler = _check_profiles(engine)
    if prompts.size:
        test = f"pp{prompts.shape[1]}"
        watch(f"profile {test}", 0, 0)
        kernels = profiler.profile(
            work=lambda: list(_prefill(engine, prompts)), warm_up=lambda: list(_prefill(engine, prompts[:1]))
        )
        yield KernelProfile(test, tuple(kernels))
    if steps.size:
        test = f"tg{len(steps)}"
        watch(f"profile {test}", 0, 0)
        kernels = profiler.profile(
            work=lambda: list(_decode(engine, steps)), warm_up=lambda: list(_decode(engine, steps[:_WARM_STEPS]))
        )
        yield KernelProfile(test, tuple(kernels))


def _rate(test: str, tokens: int, runs: list[np.ndarray]) -> Rate:
    rates = [tokens / run[-1] for run in runs]
    return Rate(test, float(np.median(rates)), float(min(rates)), float(max(rates)))
