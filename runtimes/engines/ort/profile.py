"""Read the trace that ONNX Runtime's profiler writes: time by kernel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ....errors import UsageError
from ..base import KernelTime


def kernel_times(traces: Iterable[tuple[Path, int]]) -> list[KernelTime]:
    """Sum the time of each op type over the traces of several sessions, the longest first.

    Args:
        traces: trace files, and how many of the first calls of each session are not counted.

    Raises:
        UsageError: PROFILE_TOO_LONG if the profiler dropped events.
    """
    calls: dict[str, int] = {}
    times: dict[str, int] = {}
    for trace, skipped in traces:
        for op, us in _own_times(_kernel_events(trace, skipped)):
            calls[op] = calls.get(op, 0) + 1
            times[op] = times.get(op, 0) + us
    return [KernelTime(op, calls[op], times[op] / 1000) for op in sorted(times, key=lambda op: -times[op])]


def _kernel_events(trace: Path, skipped: int) -> list[tuple[int, int, str]]:
    """Read the kernel calls after the first `skipped` runs of a session: start and duration in us, op type."""
    kernels: list[tuple[int, int, str]] = []
    runs = 0
    for event in _events(trace):
        if event["name"] == "profile_truncated":
            raise UsageError(
                "PROFILE_TOO_LONG",
                f"ONNX Runtime records at most {int(event['args']['max_num_events']):,} events of a profile.",
                "Profile fewer tokens: set smaller -p and -n.",
            )
        if event["name"] == "model_run":  # written after the kernels of the run
            runs += 1
            if runs == skipped:
                kernels.clear()
        elif event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            kernels.append((event["ts"], event["dur"], event["args"]["op_name"]))
    return kernels


def _events(trace: Path) -> Iterator[dict[str, Any]]:
    """Parse a JSON array with one event per line. Events are large, so they are read one at a time."""
    with trace.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("{"):
                yield json.loads(line.rstrip().rstrip(","))


def _own_times(events: list[tuple[int, int, str]]) -> Iterator[tuple[str, int]]:
    """Yield op types and their own time, without the kernels that run inside them, as in the body of a Loop."""
    open_events: list[list[Any]] = []  # the events around the current one: end, op type, own time
    for start, duration, op in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            yield _closed(open_events)
        if open_events:
            open_events[-1][2] -= duration
        open_events.append([start + duration, op, duration])
    while open_events:
        yield _closed(open_events)


def _closed(open_events: list[list[Any]]) -> tuple[str, int]:
    _, op, own = open_events.pop()
    return op, max(own, 0)
