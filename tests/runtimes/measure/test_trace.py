"""A recorded workload as trace events: times, nesting, and the requests of each call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from fake_engines import TimedEngine, ToyEngine, hashed

from llmc.errors import UsageError
from llmc.runtimes.engines.base import ReportsRuns
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.measure.trace import Recorder
from llmc.runtimes.measure.workload import Arrival, seeded_workload, serve_workload

STEPS, REQUESTS = 1, 2


class Reporting(TimedEngine):
    """A timed engine that runs each sequence on its own and reports it; a copy takes 2 ms.

    Attributes:
        outside: seconds of a forward call before the first run.
    """

    outside = 0.003

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.around_run: Callable[[Sequence[int]], AbstractContextManager[object]] = nullcontext

    def forward(self, batch: Batch) -> HostLogits:
        self.now += self.outside
        for length in batch.lengths.tolist():
            with self.around_run([length]):
                self.now += 0.001 * length
        self.now += 0.001
        return ToyEngine.forward(self, batch)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self.now += 0.002
        super().copy_slot(source, target, length)


def record(engine: TimedEngine, arrivals: Sequence[Arrival], concurrency: int = 2) -> list[dict[str, Any]]:
    """Serve a workload; return the events of its trace as they are read from a file."""
    recorder = Recorder(engine.clock)
    serve_workload(engine, arrivals, concurrency, recorder=recorder, clock=engine.clock, sleep=engine.sleep)
    events: list[dict[str, Any]] = json.loads(json.dumps(recorder.document()))["traceEvents"]
    return events


def slices(events: Sequence[dict[str, Any]], process: int, track: int) -> list[dict[str, Any]]:
    return [event for event in events if (event["ph"], event["pid"], event["tid"]) == ("X", process, track)]


def times(events: Sequence[dict[str, Any]], process: int, track: int) -> list[tuple[str, int, int]]:
    """Return the slices of a track: name, start and end in ms."""
    found = slices(events, process, track)
    assert all(event["ts"] % 1000 == event["dur"] % 1000 == 0 for event in found)
    return [(event["name"], event["ts"] // 1000, (event["ts"] + event["dur"]) // 1000) for event in found]


ARRIVALS = [Arrival([1, 2, 3], 3), Arrival([4], 2, 0.005), Arrival([5, 6], 1, 0.008)]


def test_the_slices_of_a_workload() -> None:
    events = record(Reporting(hashed()), ARRIVALS)
    # The second request gets a slot in the second step, the third when the first two are done.
    assert times(events, STEPS, 0) == [
        ("step", 0, 7), ("forward", 0, 7), ("run", 3, 6),
        ("step", 7, 13), ("forward", 7, 13), ("run", 10, 11), ("run", 11, 12),
        ("step", 13, 19), ("forward", 13, 19), ("run", 16, 17), ("run", 17, 18),
        ("step", 19, 25), ("forward", 19, 25), ("run", 22, 24),
    ]  # fmt: skip
    assert times(events, REQUESTS, 0) == [
        ("request 0", 0, 19), ("prompt", 0, 7), ("token", 7, 13), ("token", 13, 19),
    ]  # fmt: skip
    assert times(events, REQUESTS, 1) == [
        ("request 1", 5, 19), ("waiting", 5, 7), ("prompt", 7, 13), ("token", 13, 19),
    ]  # fmt: skip
    assert times(events, REQUESTS, 2) == [("request 2", 8, 25), ("waiting", 8, 19), ("prompt", 19, 25)]


def test_what_a_slice_says() -> None:
    events = record(Reporting(hashed()), ARRIVALS)
    steps = [event["args"] for event in slices(events, STEPS, 0) if event["name"] == "step"]
    assert steps == [
        {"tokens": 3, "decoding": 0, "prompt_tokens": 3, "waiting": 0},
        {"tokens": 2, "decoding": 1, "prompt_tokens": 1, "waiting": 0},
        {"tokens": 2, "decoding": 2, "prompt_tokens": 0, "waiting": 1},
        {"tokens": 2, "decoding": 0, "prompt_tokens": 2, "waiting": 0},
    ]
    forwards = [event["args"] for event in slices(events, STEPS, 0) if event["name"] == "forward"]
    assert forwards[1] == {"sequences": 2, "tokens": 2, "tokens_per_sequence": [1, 1], "requests": [0, 1], "runs": 1}
    runs = [event["args"] for event in slices(events, STEPS, 0) if event["name"] == "run"]
    assert runs[0] == {"sequences": 1, "tokens_per_sequence": [3]}
    whole, prompt, token, _ = (event["args"] for event in slices(events, REQUESTS, 0))
    assert whole == {"prompt_tokens": 3, "new_tokens": 3, "finish_reason": "length"}
    assert (prompt, token) == ({"tokens": 3, "start": 0}, {"tokens": 1, "start": 3})


class Slow(Reporting):
    """An engine whose slots take 5 ms to open; choosing from its logits takes 4 ms."""

    def open_slots(self, count: int) -> None:
        self.now += 0.005
        super().open_slots(count)

    def forward(self, batch: Batch) -> HostLogits:
        logits, best = super().forward(batch), None

        def argmax() -> Any:
            nonlocal best
            self.now += 0.004
            return best

        best = logits.argmax()
        logits.argmax = argmax  # type: ignore[method-assign]
        return logits


def test_time_outside_of_the_engine() -> None:
    # The first request ends before the second, which then moves to the first slot.
    events = record(Slow(hashed()), [Arrival([1, 2], 2), Arrival([3], 3)])
    assert times(events, STEPS, 0) == [
        ("step", 0, 16), ("schedule", 0, 5), ("open slots", 0, 5), ("forward", 5, 12),
        ("run", 8, 10), ("run", 10, 11), ("sample", 12, 16),
        ("step", 16, 28), ("forward", 16, 22), ("run", 19, 20), ("run", 20, 21),
        ("sample", 22, 28), ("copy slot", 26, 28),
        ("step", 28, 37), ("forward", 28, 33), ("run", 31, 32), ("sample", 33, 37),
    ]  # fmt: skip
    (copy,) = (event["args"] for event in slices(events, STEPS, 0) if event["name"] == "copy slot")
    assert copy == {"source": 1, "target": 0, "tokens": 2}


class Immediate(Reporting):
    outside = 0.0


def test_a_run_is_inside_of_a_call_that_begins_at_the_same_time() -> None:
    names = [name for name, *_ in times(record(Immediate(hashed()), ARRIVALS), STEPS, 0)]
    assert names[:6] == ["step", "forward", "run", "step", "forward", "run"]


class Uneven(Reporting):
    """An engine whose times are no whole microseconds."""

    outside = 0.003 + 1e-6 / 3


def test_a_long_workload_is_nested_and_complete() -> None:
    arrivals = seeded_workload(20, 32, rate=30.0)
    events = record(Uneven(hashed(), max_seq_len=128), arrivals, concurrency=4)
    for process, track in ((STEPS, 0), *((REQUESTS, number) for number in range(20))):
        open_until: list[int] = []
        for event in slices(events, process, track):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1]
            open_until.append(event["ts"] + event["dur"])
    for number, arrival in enumerate(arrivals):
        whole, *parts = slices(events, REQUESTS, number)
        prompts = [part["args"] for part in parts if part["name"] == "prompt"]
        assert sum(args["tokens"] for args in prompts) == len(arrival.prompt) == whole["args"]["prompt_tokens"]
        assert prompts[0]["start"] == 0
        assert sum(part["name"] == "token" for part in parts) == arrival.new_tokens - 1
        assert whole["ts"] == pytest.approx(1e6 * arrival.at_s, abs=1)
        assert whole["ts"] + whole["dur"] == parts[-1]["ts"] + parts[-1]["dur"]


def test_tracks_have_names_and_an_order() -> None:
    events = record(TimedEngine(hashed()), ARRIVALS)
    found = {
        (event["pid"], event["tid"], event["name"]): next(iter(event["args"].values()))
        for event in events
        if event["ph"] == "M"
    }
    assert [found[STEPS, 0, name] for name in ("process_name", "process_sort_index", "thread_name")] == [
        "scheduler", 1, "steps",
    ]  # fmt: skip
    assert [found[REQUESTS, 2, f"{of}_{what}"] for of in ("process", "thread") for what in ("name", "sort_index")] == [
        "requests", 2, "request 2", 2,
    ]  # fmt: skip


def test_recording_changes_no_call() -> None:
    plain, recorded = (TimedEngine(hashed(), max_seq_len=128) for _ in range(2))
    arrivals = seeded_workload(12, 32, rate=20.0)
    serve_workload(plain, arrivals, 3, clock=plain.clock, sleep=plain.sleep)
    record(recorded, arrivals, concurrency=3)
    assert len(plain.calls) == len(recorded.calls)
    for one, other in zip(plain.calls, recorded.calls, strict=True):
        assert (one.tokens.tolist(), one.slots.tolist()) == (other.tokens.tolist(), other.slots.tolist())
    assert (plain.copies, plain.opened) == (recorded.copies, recorded.opened)


def test_an_engine_that_does_not_report_its_runs() -> None:
    engine = TimedEngine(hashed())
    assert not isinstance(engine, ReportsRuns)
    assert {event["name"] for event in slices(record(engine, ARRIVALS), STEPS, 0)} == {"step", "forward"}


class Failing(Reporting):
    def forward(self, batch: Batch) -> HostLogits:
        super().forward(batch)
        raise UsageError("BATCH_INVALID", "No.", "")


def test_the_engine_is_left_as_it_was() -> None:
    for kind in (Reporting, Failing):
        engine = kind(hashed())
        assert isinstance(engine, ReportsRuns)
        before = engine.around_run = lambda lengths: nullcontext()
        recorder = Recorder(engine.clock)
        try:
            serve_workload(engine, ARRIVALS, 2, recorder=recorder, clock=engine.clock, sleep=engine.sleep)
        except UsageError:
            assert kind is Failing
        assert engine.around_run is before


def test_a_trace_of_nothing() -> None:
    assert [event["ph"] for event in Recorder().document()["traceEvents"]] == ["M"] * 4


class Recovering(TimedEngine):
    """An engine whose third call fails, and the attempt to repeat it."""

    def forward(self, batch: Batch) -> HostLogits:
        logits = super().forward(batch)
        if len(self.calls) in (3, 4):
            raise UsageError("ROLLBACK_TOO_FAR", "No.", "")
        return logits


def test_a_request_that_starts_again() -> None:
    """After an error of the engine, the tokens of a sequence are computed again from the first one."""
    events = record(Recovering(hashed()), [Arrival([1, 2], 4), Arrival([3], 4)])
    assert [(event["name"], *event["args"].values()) for event in slices(events, REQUESTS, 0)] == [
        ("request 0", 2, 4, "length"), ("prompt", 2, 0), ("token", 1, 2), ("token", 1, 3), ("prompt", 4, 0),
        ("token", 1, 4),
    ]  # fmt: skip
    calls = [event["args"]["requests"] for event in slices(events, STEPS, 0) if event["name"] == "forward"]
    assert calls[2:6] == [[0, 1], [0], [1], [1, 0]]


def test_the_recorded_engine_passes_everything_on() -> None:
    engine = ToyEngine(hashed(), slots=3)
    wrapped = Recorder().wrap(engine)
    assert (wrapped.spec, wrapped.slots, wrapped.runs) == (engine.spec, 3, 0)
    wrapped.close()
    assert engine.slots == -1
