"""Measure an engine under a workload: requests of mixed lengths that come and go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, median_low
from typing import Any

import numpy as np

from ...errors import UsageError
from ..engines.base import Engine
from ..generate.request import Failed, Request, Token
from ..generate.sampling import SamplingParams
from ..generate.scheduler import Scheduler
from .bench import Latency
from .trace import Recorder

# Lengths of a seeded workload, from and to, both included.
PROMPT_TOKENS, NEW_TOKENS = (4, 40), (4, 47)


@dataclass(frozen=True, eq=False)
class Arrival:
    """A request of a workload.

    Attributes:
        prompt: token ids.
        new_tokens: tokens to generate.
        at_s: when it arrives, in seconds after the beginning.
    """

    prompt: Sequence[int] | np.ndarray
    new_tokens: int
    at_s: float = 0.0


@dataclass(frozen=True, eq=False)
class ServedWorkload:
    """A workload that was served once.

    Attributes:
        tokens: generated tokens.
        seconds: from the first arrival to the last token.
        ttft_s: for each request, the time from its arrival to its first token.
        itl_s: for each other token, the time since the request's token before it.
        steps: steps of the scheduler.
        runs: runs of a graph.
    """

    tokens: int
    seconds: float
    ttft_s: np.ndarray
    itl_s: np.ndarray
    steps: int
    runs: int


@dataclass(frozen=True)
class WorkloadResult:
    """The measured service of a workload, over all times that it was served.

    Attributes:
        tokens: generated tokens of one time.
        tokens_per_s: generated tokens a second, all requests together: the median; also the slowest and the fastest.
        seconds: from the first arrival to the last token, the median.
        ttft_ms: time from the arrival of a request to its first token.
        itl_ms: time from a token of a request to its next one.
        steps: steps of the scheduler, the median.
        runs: runs of a graph, the median.
        fewest_runs: one for each prompt, and one for every `concurrency` tokens that follow a first one.
        repeats: how often the workload was served.
    """

    requests: int
    tokens: int
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    seconds: float
    ttft_ms: Latency
    itl_ms: Latency
    steps: int
    runs: int
    fewest_runs: int
    concurrency: int
    repeats: int

    @classmethod
    def of(cls, served: Sequence[ServedWorkload], concurrency: int) -> WorkloadResult:
        """Summarize one workload that was served several times."""
        requests, tokens = len(served[0].ttft_s), served[0].tokens
        rates = [one.tokens / one.seconds for one in served]
        return cls(
            requests=requests,
            tokens=tokens,
            tokens_per_s=median(rates),
            tokens_per_s_min=min(rates),
            tokens_per_s_max=max(rates),
            seconds=median(one.seconds for one in served),
            ttft_ms=Latency.of(np.concatenate([one.ttft_s for one in served])),
            itl_ms=Latency.of(np.concatenate([one.itl_s for one in served])),
            steps=median_low(one.steps for one in served),
            runs=median_low(one.runs for one in served),
            fewest_runs=requests + -(-(tokens - requests) // concurrency),
            concurrency=concurrency,
            repeats=len(served),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the layout of `llmc bench --output-format json`."""
        return asdict(self) | {"runs_per_step": self.runs / self.steps}


def seeded_workload(requests: int, vocab_size: int, rate: float | None = None, seed: int = 0) -> list[Arrival]:
    """Return requests of random tokens and lengths.

    Args:
        rate: mean arrivals a second, at random times; None: all at the beginning.
    """
    if requests < 1:
        raise _invalid("it has no request")
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, requests) if rate else np.zeros(requests)
    times = np.concatenate([[0.0], gaps.cumsum()])[:requests]
    return [
        Arrival(
            random.integers(0, vocab_size, random.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1)),
            int(random.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1)),
            float(at),
        )
        for at in times
    ]


def read_workload(path: Path, vocab_size: int) -> list[Arrival]:
    """Read a workload: a JSON object per line with `prompt_tokens`, `new_tokens` and optionally `at_s`.

    Prompts are random tokens of that number.

    Raises:
        UsageError: WORKLOAD_INVALID.
    """
    random = np.random.default_rng(0)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(f"{path} can't be read: {error}") from None
    arrivals = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt_tokens, new_tokens, at_s = _parse(line, f"{path}:{number}")
            arrivals.append(Arrival(random.integers(0, vocab_size, prompt_tokens), new_tokens, at_s))
    if not arrivals:
        raise _invalid(f"{path} has no request")
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _parse(line: str, place: str) -> tuple[int, int, float]:
    try:
        entry = json.loads(line)
        prompt, new, at_s = entry["prompt_tokens"], entry["new_tokens"], float(entry.get("at_s", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _invalid(f"{place} is not such an object: {error}") from None
    if not (type(prompt) is type(new) is int and prompt > 0 and new > 0 and 0 <= at_s < float("inf")):
        raise _invalid(f"{place} has a number that is out of range")
    return prompt, new, at_s


def _invalid(what: str) -> UsageError:
    return UsageError(
        "WORKLOAD_INVALID",
        f"The workload can't be used: {what}.",
        'Give a JSON object per line: {"prompt_tokens": 20, "new_tokens": 30, "at_s": 0.5}',
    )


def measure_workload(
    engines: Sequence[Engine],
    arrivals: Sequence[Arrival],
    repeats: int,
    concurrency: int,
    *,
    recorder: Recorder | None = None,
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[WorkloadResult]:
    """Serve a workload with engines in turn, each `repeats` times, after a short warm-up of each.

    Args:
        concurrency: the largest number of requests that run at once.
        recorder: records the last time that the workload is served.
        watch: called with the phase, the number of its workloads that were served and the number of all.

    Returns:
        The results in the order of the engines.

    Raises:
        LlmcError: that of a request that failed.
    """
    for done, engine in enumerate(engines):
        watch("warm-up", done, len(engines))
        warm_up = seeded_workload(2 * concurrency, engine.spec.vocab_size)
        serve_workload(engine, warm_up, concurrency, clock=clock, sleep=sleep)
    served: list[list[ServedWorkload]] = [[] for _ in engines]
    total = repeats * len(engines)
    for done in range(total):
        watch("workload", done, total)
        turn = done % len(engines)
        record = recorder if done == total - 1 else None
        served[turn].append(
            serve_workload(engines[turn], arrivals, concurrency, recorder=record, clock=clock, sleep=sleep)
        )
    return [WorkloadResult.of(those, concurrency) for those in served]


def serve_workload(
    engine: Engine,
    arrivals: Sequence[Arrival],
    concurrency: int,
    *,
    recorder: Recorder | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> ServedWorkload:
    """Serve the requests of a workload once, each from its arrival on, and measure.

    Args:
        concurrency: the largest number of requests that run at once.
        recorder: records steps, calls of the engine and requests.

    Raises:
        LlmcError: that of a request that failed.
    """
    used = recorder.wrap(engine) if recorder else engine
    scheduler = Scheduler(used, batch_size=concurrency, clock=clock)
    step = partial(recorder.step, scheduler) if recorder else scheduler.step
    times: dict[int, list[float]] = {}  # by request: arrival, then each token
    runs, steps, began = engine.runs, 0, clock()
    coming = list(arrivals)
    while coming or not scheduler.is_idle:
        now = clock() - began
        while coming and coming[0].at_s <= now:
            arrival = coming.pop(0)
            params = SamplingParams(max_tokens=arrival.new_tokens, ignore_eos=True)
            request = scheduler.add(Request(arrival.prompt, params))
            times[request] = [arrival.at_s]
            if recorder:
                recorder.add(request, began + arrival.at_s, len(arrival.prompt))
        if scheduler.is_idle:
            sleep(coming[0].at_s - now)
            continue
        events = step()
        steps += 1
        now = clock() - began
        for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Token):
                times[event.request].append(now)
    return ServedWorkload(
        tokens=sum(len(one) - 1 for one in times.values()),
        seconds=clock() - began,
        ttft_s=np.array([one[1] - one[0] for one in times.values()]),
        itl_s=np.concatenate([np.diff(one[1:]) for one in times.values()]),
        steps=steps,
        runs=engine.runs - runs,
    )
