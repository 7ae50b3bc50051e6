"""Time by kernel: from hand-written traces, and of a real artifact."""

from __future__ import annotations

import glob
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from batches import forward
from compiled import artifact
from fake_engines import ToyEngine, hashed

import llmc
from llmc.errors import UsageError
from llmc.runtimes.engines.base import KernelTime, Profiles
from llmc.runtimes.engines.ort import graph as graph_module
from llmc.runtimes.engines.ort.engine import OrtEngine
from llmc.runtimes.engines.ort.profile import kernel_times

STEPS = 5


def event(name: str, ts: int, dur: int, op: str = "", **arguments: str) -> dict[str, Any]:
    """One event as ONNX Runtime writes it."""
    named = {"op_name": op} if op else {}
    return {
        "cat": "Node" if op else "Session",
        "ts": ts,
        "dur": dur,
        "ph": "X",
        "name": name,
        "args": named | arguments,
    }


def kernel(op: str, ts: int, dur: int) -> dict[str, Any]:
    return event(f"node_{ts}_kernel_time", ts, dur, op)


def run(ts: int, dur: int) -> dict[str, Any]:
    return event("model_run", ts, dur)


def trace(folder: Path, *events: dict[str, Any]) -> Path:
    path = folder / f"trace-{len(list(folder.iterdir()))}.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, events)) + "\n]\n")
    return path


def test_calls_and_times_are_summed_over_sessions(tmp_path: Path) -> None:
    start = event("session_initialization", 0, 900)
    one = trace(tmp_path, start, kernel("MatMul", 1000, 30), kernel("Add", 1030, 10), run(990, 60))
    other = trace(tmp_path, start, kernel("Add", 1000, 5), kernel("Add", 1005, 5), run(1000, 10))
    assert kernel_times([(one, 0), (other, 0)]) == [KernelTime("MatMul", 1, 0.03), KernelTime("Add", 3, 0.02)]


def test_first_runs_are_skipped(tmp_path: Path) -> None:
    runs = [(kernel("Add", 1000 * i, 100 // i), run(1000 * i, 110)) for i in (1, 2, 5)]
    path = trace(tmp_path, *(event for pair in runs for event in pair))
    assert [kernel_times([(path, skipped)])[0].calls for skipped in (0, 1, 2)] == [3, 2, 1]
    assert kernel_times([(path, 2)]) == [KernelTime("Add", 1, 0.02)]
    assert kernel_times([(path, 3)]) == []


def test_the_time_of_a_body_is_not_counted_twice(tmp_path: Path) -> None:
    # Kernels of a body are written before the op that runs it.
    body = [kernel("Sin", 110, 20), kernel("If", 135, 40), kernel("Cos", 140, 30), kernel("Sin", 180, 15)]
    path = trace(tmp_path, *body, kernel("Loop", 100, 100), kernel("Exp", 200, 7), run(90, 120))
    times = {time.kernel: (time.calls, time.ms) for time in kernel_times([(path, 0)])}
    assert times == {"Sin": (2, 0.035), "Cos": (1, 0.03), "Loop": (1, 0.025), "If": (1, 0.01), "Exp": (1, 0.007)}


def test_a_truncated_profile_is_refused(tmp_path: Path) -> None:
    truncated = event("profile_truncated", 9, 0, max_num_events="1000000")
    with pytest.raises(UsageError, match=r"PROFILE_TOO_LONG.*1,000,000"):
        kernel_times([(trace(tmp_path, kernel("Add", 1, 2), run(1, 3), truncated), 0)])


def decode(engine: OrtEngine, steps: int) -> list[np.ndarray]:
    return [forward(engine, np.array([[3 + i]]), np.array([i])) for i in range(steps)]


@pytest.fixture
def engine() -> OrtEngine:
    loaded = llmc.load(artifact("speaking"), threads=1)
    assert isinstance(loaded, OrtEngine)
    return loaded


def test_the_kernels_of_decode_steps(engine: OrtEngine) -> None:
    before = set(glob.glob(f"{tempfile.gettempdir()}/llmc-profile-*"))
    plain, profiled = decode(engine, STEPS), []
    times = engine.profile(lambda: profiled.extend(decode(engine, STEPS)), lambda: decode(engine, 2))
    for one, other in zip(plain, profiled, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [time.ms for time in times] == sorted((time.ms for time in times), reverse=True) and times[0].ms > 0
    calls = {time.kernel: time.calls for time in times}
    graph = onnx.load(artifact("speaking") / "model.onnx", load_external_data=False).graph
    attention = sum(node.op_type == "GroupQueryAttention" for node in graph.node)
    assert calls["GroupQueryAttention"] == attention * STEPS == 2 * STEPS
    assert all(count % STEPS == 0 for count in calls.values())
    assert set(glob.glob(f"{tempfile.gettempdir()}/llmc-profile-*")) <= before, "the trace is removed"


def test_an_engine_works_after_its_profile(engine: OrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, opened, honest = decode(engine, 2), [], graph_module.open_session

    def open_session(*arguments: Any) -> Any:
        session, held = honest(*arguments)
        opened.append(session)
        return session, held

    monkeypatch.setattr(graph_module, "open_session", open_session)
    with pytest.raises(ZeroDivisionError):
        engine.profile(lambda: 1 / 0, lambda: decode(engine, 1))
    for one, other in zip(plain, decode(engine, 2), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [s.get_session_options().enable_profiling for s in opened] == [True, False]


def test_who_can_profile(engine: OrtEngine) -> None:
    assert isinstance(engine, Profiles) and not isinstance(ToyEngine(hashed()), Profiles)
