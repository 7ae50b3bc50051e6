"""A workload is served as it arrives, and its times are those of the clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_engines import TimedEngine, ToyEngine, hashed

from llmc.errors import UsageError
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.measure.trace import Recorder
from llmc.runtimes.measure.workload import (
    Arrival,
    ServedWorkload,
    WorkloadResult,
    measure_workload,
    read_workload,
    seeded_workload,
    serve_workload,
)


def test_times_count_from_the_arrival() -> None:
    engine = TimedEngine(hashed())
    arrivals = [Arrival([1, 2, 3], 3), Arrival([4], 2, 0.012), Arrival([5], 1, 9.0)]
    result = serve_workload(engine, arrivals, 2, clock=engine.clock, sleep=engine.sleep)
    # Steps: the first prompt (13 ms); its second token with the second prompt (12 ms); the last tokens of both (12 ms);
    # nothing until the third request arrives, which takes 11 ms.
    assert (result.tokens, result.steps, result.runs) == (6, 4, 4)
    assert result.seconds == pytest.approx(9.011)
    assert result.ttft_s == pytest.approx([0.013, 0.025 - 0.012, 0.011])
    assert result.itl_s == pytest.approx([0.012] * 3)


def test_percentiles_have_enough_samples() -> None:
    engine = TimedEngine(hashed(), max_seq_len=128)
    served = serve_workload(engine, seeded_workload(20, 32), 4, clock=engine.clock, sleep=engine.sleep)
    result = WorkloadResult.of([served], 4)
    assert result.ttft_ms.p95 is not None and result.ttft_ms.p99 is None and result.itl_ms.p99 is not None
    assert result.tokens == sum(arrival.new_tokens for arrival in seeded_workload(20, 32)) > 200


def test_a_result_is_of_all_times_that_a_workload_was_served() -> None:
    served = [
        ServedWorkload(6, seconds, np.array([ttft] * 2), np.array([ttft / 2] * 10), steps, runs)
        for seconds, ttft, steps, runs in ((2.0, 0.1, 5, 8), (1.0, 0.2, 4, 6), (4.0, 0.4, 6, 7))
    ]
    result = WorkloadResult.of(served, 3)
    assert (result.tokens_per_s, result.tokens_per_s_min, result.tokens_per_s_max) == (3, 1.5, 6)
    assert (result.requests, result.tokens, result.seconds, result.repeats) == (2, 6, 2, 3)
    assert (result.steps, result.runs, result.fewest_runs) == (5, 7, 2 + 2)
    assert result.ttft_ms.p50 == 200 and result.ttft_ms.p95 is None
    assert result.itl_ms.p50 == 100 and result.itl_ms.p95 == 200  # 30 samples
    assert WorkloadResult.of(served[:2], 3).steps == 4  # a count stays a whole number
    assert result.as_dict() == {
        "requests": 2,
        "tokens": 6,
        "tokens_per_s": 3,
        "tokens_per_s_min": 1.5,
        "tokens_per_s_max": 6,
        "seconds": 2,
        "ttft_ms": {"p50": 200, "p95": None, "p99": None},
        "itl_ms": {"p50": 100, "p95": 200, "p99": None},
        "steps": 5,
        "runs": 7,
        "runs_per_step": 1.4,
        "fewest_runs": 4,
        "concurrency": 3,
        "repeats": 3,
    }


class Named(ToyEngine):
    """An engine that notes the prompts of two tokens that it runs, which no warm-up has, in a shared list."""

    seen: list[str] = []

    def __init__(self, name: str) -> None:
        super().__init__(hashed(), max_seq_len=128)
        self.name = name

    def forward(self, batch: Batch) -> HostLogits:
        self.seen += [self.name for length in batch.lengths if length == 2]
        return super().forward(batch)


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Named, "seen", [])
    phases: list[tuple[str, int, int]] = []
    engines = [Named("a"), Named("b")]
    results = measure_workload(engines, [Arrival([1, 2], 2)], 3, 1, watch=lambda *phase: phases.append(phase))
    assert Named.seen == ["a", "b"] * 3
    assert phases == [("warm-up", 0, 2), ("warm-up", 1, 2), *(("workload", done, 6) for done in range(6))]
    assert [(result.requests, result.tokens, result.repeats, result.steps) for result in results] == [(1, 2, 3, 2)] * 2
    assert all(len(engine.calls) > 3 * 2 for engine in engines)  # there was a warm-up


def test_only_the_last_time_is_recorded() -> None:
    engine, recorder = ToyEngine(hashed(), max_seq_len=128), Recorder()
    (result,) = measure_workload([engine], seeded_workload(5, 32), 3, 2, recorder=recorder)
    names = [event["name"] for event in recorder.document()["traceEvents"]]
    assert names.count("step") == result.steps > 5
    assert [names.count(f"request {number}") for number in (0, 4, 5)] == [1, 1, 0]


def test_a_seeded_workload_is_always_the_same() -> None:
    one, other = seeded_workload(200, 50, rate=10.0), seeded_workload(200, 50, rate=10.0)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.prompt, b.prompt) and (a.new_tokens, a.at_s) == (b.new_tokens, b.at_s)
    assert {len(arrival.prompt) for arrival in one} == set(range(4, 41))
    assert {arrival.new_tokens for arrival in one} == set(range(4, 48))
    assert one[0].at_s == 0 and one[-1].at_s == pytest.approx(20, rel=0.3)
    assert all(arrival.at_s == 0 for arrival in seeded_workload(5, 50))


def test_a_workload_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt_tokens": 3, "new_tokens": 4, "at_s": 2}\n\n{"prompt_tokens": 1, "new_tokens": 2}\n')
    first, second = read_workload(path, 50)
    assert (len(first.prompt), first.new_tokens, first.at_s) == (1, 2, 0)
    assert (len(second.prompt), second.new_tokens, second.at_s) == (3, 4, 2)
    assert max(second.prompt) < 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no request"),
        ("{", r"w:1 is not"),
        ('{"prompt_tokens": 1, "new_tokens": 1}\n[1]', r"w:2 is not"),
        ('{"prompt_tokens": 3}', "new_tokens"),
        ('{"prompt_tokens": 0, "new_tokens": 1}', "out of range"),
        ('{"prompt_tokens": 1.5, "new_tokens": 1}', "out of range"),
        ('{"prompt_tokens": 1, "new_tokens": true}', "out of range"),
        ('{"prompt_tokens": 1, "new_tokens": 1, "at_s": -1}', "out of range"),
        ('{"prompt_tokens": 1, "new_tokens": 1, "at_s": NaN}', "out of range"),
        ('{"prompt_tokens": 1, "new_tokens": 1, "at_s": [1]}', "is not"),
        (None, "can't be read"),
    ],
)
def test_files_that_are_no_workload(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "w").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_workload(tmp_path / "w", 50)
    assert caught.value.code == "WORKLOAD_INVALID"
