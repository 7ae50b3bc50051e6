"""Measure the speed of an engine: prefill, decode, latency, and on request the time by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

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
        peak_rss_bytes: peak memory of this process; None if it is unknown, or if the process ran several engines.
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
            **({} if self.peak_rss_bytes is None else {"peak_rss_bytes": self.peak_rss_bytes}),
            "threads": self.threads,
            "repeats": self.repeats,
            "concurrency": self.concurrency,
        }


def bench(
    engines: Sequence[Engine],
    prompt: int = 512,
    tokens: int = 128,
    repeats: int = 5,
    concurrency: int = 1,
    *,
    profile: bool = False,
    watch: Callable[[str, int, int], None] = lambda test, done, total: None,
) -> list[BenchResult]:
    """Measure engines as llama-bench does: random tokens, no sampling, each test warmed up once.

    The test `ppN` runs a prompt of N tokens into an empty cache, one sequence after the other. The test `tgN` takes N
    steps of one token from an empty cache, all sequences together. Several engines take turns: each runs a test once
    before the first one runs it again, so that other load on the machine affects all of them.

    Args:
        prompt: tokens of the prefill test; 0 leaves it out.
        tokens: steps of the decode test; 0 leaves it out.
        repeats: measured runs of each test and engine.
        concurrency: number of sequences.
        profile: run each test once more under the engine's profiler.
        watch: called with the test, the number of its runs that are done and the number of all.

    Returns:
        The results in the order of the engines.

    Raises:
        LlmcError: BENCH_TOO_LONG if a test doesn't fit into a cache.
        UsageError: PROFILE_UNSUPPORTED if an engine has no profiler, PROFILE_TOO_LONG if it can't record a test.
    """
    for engine in engines:
        _check(engine, prompt, tokens, profile)
    for engine in engines:
        engine.open_slots(concurrency)
    inputs = [_Inputs.draw(engine, prompt, tokens, concurrency) for engine in engines]
    prefills = [partial(_prefill, engine, given.prompts) for engine, given in zip(engines, inputs, strict=True)]
    decodes = [partial(_decode, engine, given.steps) for engine, given in zip(engines, inputs, strict=True)]
    prefill_runs = _take_turns(prefills, f"pp{prompt}", repeats if prompt else None, watch)
    decode_runs = _take_turns(decodes, f"tg{tokens}", repeats if tokens else None, watch)
    peak = peak_rss() if len(engines) == 1 else None
    results = []
    for index, engine in enumerate(engines):
        rates, ttft, tpot = [], None, None
        if runs := prefill_runs[index]:
            rates.append(_rate(f"pp{prompt}", prompt * concurrency, runs))
            ttft = Latency.of(np.concatenate(runs))
        if runs := decode_runs[index]:
            rates.append(_rate(f"tg{tokens}", tokens * concurrency, runs))
            tpot = Latency.of(np.concatenate([np.diff(run, prepend=0.0) for run in runs]))
        profiles = tuple(_profiles(engine, inputs[index], watch)) if profile else ()
        results.append(BenchResult(tuple(rates), ttft, tpot, repeats, concurrency, peak, profiles=profiles))
    return results


class _Inputs(NamedTuple):
    """Random tokens: the prompts of the prefill test, [B, S], and the steps of the decode test, [N, B]."""

    prompts: np.ndarray
    steps: np.ndarray

    @classmethod
    def draw(cls, engine: Engine, prompt: int, tokens: int, concurrency: int) -> _Inputs:
        """Draw tokens of an engine's vocabulary, the same at each call."""
        random = np.random.default_rng(0)
        return cls(
            random.integers(0, engine.spec.vocab_size, (concurrency, prompt)),
            random.integers(0, engine.spec.vocab_size, (tokens, concurrency)),
        )


def _check(engine: Engine, prompt: int, tokens: int, profile: bool) -> None:
    if profile:
        _check_profiles(engine)
    for test, length in (("prompt", prompt), ("decode test", tokens)):
        if length > engine.spec.max_seq_len:
            raise UsageError(
                "BENCH_TOO_LONG",
                f"The {test} has {length} tokens, but an artifact serves at most {engine.spec.max_seq_len}.",
                "Measure fewer tokens, or compile with a larger --max-seq-len.",
            )


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


def _take_turns(
    works: Sequence[Callable[[], Iterator[None]]],
    test: str,
    repeats: int | None,
    watch: Callable[[str, int, int], None],
) -> list[list[np.ndarray]]:
    """Run a test of all engines in turn: once to warm up, then `repeats` times; None: not at all.

    Returns:
        By engine and run, the seconds from the start of the run to the end of each of its calls.
    """
    rounds = 0 if repeats is None else repeats + 1
    runs: list[list[np.ndarray]] = [[] for _ in works]
    for done in range(rounds * len(works)):
        watch(test, done, rounds * len(works))
        turn, index = divmod(done, len(works))
        began = time.perf_counter()
        times = np.array([time.perf_counter() - began for _ in works[index]()])
        if turn:  # the first one is a warm-up
            runs[index].append(times)
    return runs


def _check_profiles(engine: Engine) -> Profiles:
    if not isinstance(engine, Profiles):
        raise UsageError(
            "PROFILE_UNSUPPORTED", "The engine of this artifact can't measure time by kernel.", "Leave out --profile."
        )
    return engine


def _profiles(engine: Engine, given: _Inputs, watch: Callable[[str, int, int], None]) -> Iterator[KernelProfile]:
    profiler = _check_profiles(engine)
    prompts, steps = given
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
