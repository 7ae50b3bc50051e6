"""Record the steps of a scheduler, the calls of its engine and its requests, as trace events for Perfetto.

A trace has a track of steps, and a track for each request. The slices of a track are nested:

    steps       step
                 ├ schedule          requests get slots, and their new tokens are collected
                 ├ forward           the engine's call
                 │  └ run            a run of a graph, if the engine reports its runs
                 └ sample            next tokens are chosen from the logits; sequences that end free their slots
    request 3   request 3            from its arrival to its last token
                 ├ waiting           until its first step
                 ├ prompt            a step that computes a piece of its prompt; after the last piece, its first token
                 └ token             a step that computes its next token

A call of the engine that copies or opens slots is a slice inside `schedule` or `sample`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..engines.base import Engine, ReportsRuns
from ..engines.batch import Batch
from ..engines.logits import Logits
from ..generate.request import Event, Finished
from ..generate.scheduler import Scheduler

# Perfetto groups tracks by process: one for the track of steps, one for those of the requests.
_STEPS, _REQUESTS = 1, 2


class Slice(NamedTuple):
    """A named time on a track, from `began` to `ended` in seconds by the recorder's clock."""

    name: str
    began: float
    ended: float
    args: Mapping[str, Any]


class Part(NamedTuple):
    """New tokens of a request in a forward call."""

    request: int
    tokens: int
    start: int


@dataclass
class _Request:
    """A request so far: its arrival, the length of its prompt, and the slices that it has."""

    arrived: float
    prompt_tokens: int
    slices: list[Slice]


class Recorder:
    """Records the steps of one scheduler.

    The scheduler uses the engine that `wrap` returns. Call `add` for each of its requests, and `step` instead of its
    own `step`; `document` is the trace.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._steps: list[Slice] = []
        self._requests: dict[int, _Request] = {}
        self._scheduler: Scheduler | None = None
        # Of the current step:
        self._calls: list[Slice] = []
        self._parts: dict[int, Part] = {}

    def wrap(self, engine: Engine) -> Engine:
        """Return an engine that passes all calls on to another one and records them."""
        return _RecordedEngine(engine, self)

    def add(self, request: int, arrived: float, prompt_tokens: int) -> None:
        """Note a request that was added to the scheduler."""
        self._requests[request] = _Request(arrived, prompt_tokens, [])

    def step(self, scheduler: Scheduler) -> list[Event]:
        """Run a step of the scheduler and record it."""
        self._scheduler, self._calls, self._parts = scheduler, [], {}
        began = self.clock()
        events = scheduler.step()
        ended = self.clock()
        self._record_step(began, ended, scheduler)
        for part in self._parts.values():
            self._record_part(part, began, ended)
        for event in events:
            if isinstance(event, Finished):
                self._record_end(event, ended)
        return events

    @contextmanager
    def call(self, name: str, args: Mapping[str, Any]) -> Iterator[None]:
        """Record a call of the engine, or a part of one, that takes place within the context."""
        began = self.clock()
        try:
            yield
        finally:
            self._calls.append(Slice(name, began, self.clock(), args))

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        """Note the sequences of a forward call; return its arguments for the trace."""
        assert self._scheduler is not None, "the engine was called outside of a step"
        by_slot = {slot: request for request, slot in self._scheduler.slots.items()}
        columns = zip(batch.slots.tolist(), batch.lengths.tolist(), batch.starts.tolist(), strict=True)
        parts = [Part(by_slot[slot], length, start) for slot, length, start in columns]
        self._parts |= {part.request: part for part in parts}
        return {
            "sequences": len(parts),
            "tokens": sum(part.tokens for part in parts),
            "tokens_per_sequence": [part.tokens for part in parts],
            "requests": [part.request for part in parts],
        }

    def _record_step(self, began: float, ended: float, scheduler: Scheduler) -> None:
        parts = self._parts.values()
        pieces = [part for part in parts if self._is_prompt(part)]
        args = {
            "tokens": sum(part.tokens for part in parts),
            "decoding": len(parts) - len(pieces),
            "prompt_tokens": sum(part.tokens for part in pieces),
            "waiting": scheduler.waiting,
        }
        calls = self._calls
        forwards = [call for call in calls if call.name == "forward"]
        starts = [began, *(call.ended for call in forwards)]
        ends = [*(call.began for call in forwards), ended]
        gaps = [Slice("sample" if i else "schedule", *gap, {}) for i, gap in enumerate(zip(starts, ends, strict=True))]
        # Slices that begin at the same time: the outer one first.
        nested = sorted([*gaps, *calls], key=lambda one: (one.began, -one.ended))
        self._steps += [Slice("step", began, ended, args), *nested]

    def _record_part(self, part: Part, began: float, ended: float) -> None:
        request = self._requests[part.request]
        if not request.slices:
            request.slices.append(Slice("waiting", request.arrived, began, {}))
        name = "prompt" if self._is_prompt(part) else "token"
        request.slices.append(Slice(name, began, ended, {"tokens": part.tokens, "start": part.start}))

    def _record_end(self, event: Finished, ended: float) -> None:
        request = self._requests[event.request]
        args = {
            "prompt_tokens": event.prompt_tokens,
            "new_tokens": event.completion_tokens,
            "finish_reason": event.reason,
        }
        request.slices.insert(0, Slice(f"request {event.request}", request.arrived, ended, args))

    def _is_prompt(self, part: Part) -> bool:
        return part.start < self._requests[part.request].prompt_tokens

    def document(self) -> dict[str, Any]:
        """Return the trace in the JSON layout that Perfetto and Chrome's `about:tracing` open.

        Times are whole microseconds, so that rounding keeps slices nested.
        """
        tracks = [(_STEPS, "scheduler", 0, "steps", self._steps)]
        for number, request in self._requests.items():
            tracks.append((_REQUESTS, "requests", number, f"request {number}", request.slices))
        origin = min((one.began for *_, slices in tracks for one in slices), default=0.0)
        events = []
        for process, process_name, track, name, slices in tracks:
            events += _names(process, process_name, track, name)
            events += _events(process, track, slices, origin)
        return {"displayTimeUnit": "ms", "traceEvents": events}


class _RecordedEngine:
    """An engine that passes all calls on to another one, and records them and their runs."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self.spec = engine.spec
        self._engine = engine
        self._recorder = recorder

    @property
    def slots(self) -> int:
        return self._engine.slots

    @property
    def runs(self) -> int:
        return self._engine.runs

    def open_slots(self, count: int) -> None:
        with self._recorder.call("open slots", {"slots": count}):
            self._engine.open_slots(count)

    def forward(self, batch: Batch) -> Logits:
        runs, args = self._engine.runs, dict(self._recorder.forward(batch))
        with self._recorder.call("forward", args), self._recorded_runs():
            logits = self._engine.forward(batch)
            args["runs"] = self._engine.runs - runs
        return logits

    def copy_slot(self, source: int, target: int, length: int) -> None:
        with self._recorder.call("copy slot", {"source": source, "target": target, "tokens": length}):
            self._engine.copy_slot(source, target, length)

    def close(self) -> None:
        self._engine.close()

    @contextmanager
    def _recorded_runs(self) -> Iterator[None]:
        engine = self._engine
        if not isinstance(engine, ReportsRuns):
            yield
            return
        before, engine.around_run = engine.around_run, self._around_run
        try:
            yield
        finally:
            engine.around_run = before

    @contextmanager
    def _around_run(self, lengths: Sequence[int]) -> Iterator[None]:
        args = {"sequences": len(lengths), "tokens_per_sequence": list(lengths)}
        with self._recorder.call("run", args):
            yield


def _names(process: int, process_name: str, track: int, track_name: str) -> list[dict[str, Any]]:
    """Return events that name a track and its process and sort them by their numbers."""
    place = {"ph": "M", "pid": process, "tid": track}
    return [
        place | {"name": "process_name", "args": {"name": process_name}},
        place | {"name": "process_sort_index", "args": {"sort_index": process}},
        place | {"name": "thread_name", "args": {"name": track_name}},
        place | {"name": "thread_sort_index", "args": {"sort_index": track}},
    ]


def _events(process: int, track: int, slices: Sequence[Slice], origin: float) -> list[dict[str, Any]]:
    events = []
    for one in slices:
        began, ended = (round(1e6 * (at - origin)) for at in (one.began, one.ended))
        if ended > began:
            place = {"ph": "X", "pid": process, "tid": track, "ts": began, "dur": ended - began}
            events.append(place | {"name": one.name, "args": dict(one.args)})
    return events
