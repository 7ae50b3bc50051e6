"""The benchmark's arithmetic, on an engine whose calls take known times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llmc import LlmcError
from llmc.errors import UsageError
from llmc.runtimes.engines.base import KernelTime
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.spec import EngineSpec
from llmc.runtimes.measure import bench as module
from llmc.runtimes.measure.bench import KernelProfile, Latency, Rate, bench


class Clocked:
    """An engine that takes, by the clock of these tests, 1 ms a prompt token and 10 ms a step; each test's runs
    get slower by half, and the first one is ten times as slow."""

    spec = EngineSpec(vocab_size=50, max_seq_len=64)

    def __init__(self) -> None:
        self.now = 0.0
        self.slots = self.runs = 0
        self.calls: list[Batch] = []

    def open_slots(self, count: int) -> None:
        self.slots = count

    def forward(self, batch: Batch) -> HostLogits:
        self.calls.append(replace(batch, starts=batch.starts.copy()))
        self.now += self.slow * (batch.lengths[0] / 1000 if batch.lengths[0] > 1 else 0.01)
        return HostLogits(np.zeros((len(batch.wanted), 50), np.float32))

    def copy_slot(self, source: int, target: int, length: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def watch(self, test: str, done: int, total: int) -> None:
        assert total == 4
        self.slow = [10.0, 1.0, 1.5, 2.0][done]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    made = Clocked()
    monkeypatch.setattr(module.time, "perf_counter", lambda: made.now)
    return made


def test_one_sequence(engine: Clocked) -> None:
    (result,) = bench([engine], prompt=20, tokens=10, repeats=3, watch=engine.watch)
    assert result.rates == (
        Rate("pp20", pytest.approx(1000 / 1.5), pytest.approx(500), pytest.approx(1000)),
        Rate("tg10", pytest.approx(100 / 1.5), pytest.approx(50), pytest.approx(100)),
    )
    assert result.ttft_ms == Latency(pytest.approx(30), None, None)  # three runs are too few for others
    assert result.tpot_ms == Latency(pytest.approx(15), pytest.approx(20), None)
    assert result.peak_rss_bytes and 1e7 < result.peak_rss_bytes < 1e12


def test_a_percentile_needs_enough_samples() -> None:
    for count, known in ((1, 1), (19, 1), (20, 2), (99, 2), (100, 3)):
        latency = Latency.of(np.arange(count) / 1000)
        values = [latency.p50, latency.p95, latency.p99]
        assert values == [*np.percentile(np.arange(count), [50, 95, 99][:known]), *[None] * (3 - known)]


def test_sequences_side_by_side(engine: Clocked) -> None:
    (result,) = bench([engine], prompt=20, tokens=10, repeats=3, concurrency=4, watch=engine.watch)
    assert engine.slots == 4
    assert [rate.max for rate in result.rates] == [pytest.approx(1000), pytest.approx(400)]
    # The last of four prompts waits for three others.
    assert result.ttft_ms and result.ttft_ms.p50 == pytest.approx(70)
    assert result.ttft_ms.p95 is None
    assert result.tpot_ms and result.tpot_ms.p50 == pytest.approx(15)


def test_the_calls_are_those_of_llama_bench(engine: Clocked) -> None:
    bench([engine], prompt=20, tokens=10, repeats=3, concurrency=2, watch=engine.watch)
    prefill, decode = engine.calls[: 4 * 2], engine.calls[4 * 2 :]
    for i, call in enumerate(prefill):
        assert (call.lengths.tolist(), call.starts.tolist(), call.slots.tolist()) == ([20], [0], [i % 2])
        assert call.wanted.tolist() == [19]
    assert len(decode) == 4 * 10
    for i, call in enumerate(decode):
        assert (call.lengths.tolist(), call.starts.tolist(), call.slots.tolist()) == ([1, 1], [i % 10] * 2, [0, 1])
        assert call.wanted.tolist() == [0, 1]
    assert all(0 <= call.tokens.min() <= call.tokens.max() < 50 for call in engine.calls)
    assert len(set(prefill[0].tokens.tolist())) > 5


class Sharing(Clocked):
    """An engine that shares a clock with others; a call takes `ms`, and ten times as long in each first run."""

    now, order = 0.0, ""

    def __init__(self, name: str, ms: float) -> None:
        super().__init__()
        self.name, self.ms = name, ms

    def forward(self, batch: Batch) -> HostLogits:
        warms_up = len(self.calls) in (0, 3)
        self.calls.append(batch)
        Sharing.order += self.name
        Sharing.now += self.ms / 1000 * (10 if warms_up else 1)
        return HostLogits(np.zeros((len(batch.wanted), 50), np.float32))


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sharing, "now", 0.0)
    monkeypatch.setattr(Sharing, "order", "")
    monkeypatch.setattr(module.time, "perf_counter", lambda: Sharing.now)
    engines = [Sharing("a", 10), Sharing("b", 20), Sharing("c", 40)]
    seen: list[tuple[str, int, int]] = []
    results = bench(engines, prompt=20, tokens=1, repeats=2, watch=lambda *step: seen.append(step))
    assert Sharing.order == "abc" * 3 * 2
    assert seen == [*(("pp20", done, 9) for done in range(9)), *(("tg1", done, 9) for done in range(9))]
    assert [[rate.median for rate in result.rates] for result in results] == [
        [pytest.approx(2000), pytest.approx(100)],
        [pytest.approx(1000), pytest.approx(50)],
        [pytest.approx(500), pytest.approx(25)],
    ]
    assert [result.tpot_ms and result.tpot_ms.p50 for result in results] == [pytest.approx(ms) for ms in (10, 20, 40)]


def test_the_memory_of_several_engines_is_not_that_of_one(engine: Clocked) -> None:
    engine.slow = 1.0
    one, several = bench([engine], repeats=1, tokens=1, prompt=1), bench([engine] * 2, repeats=1, tokens=1, prompt=1)
    assert "peak_rss_bytes" in one[0].as_dict()
    assert all("peak_rss_bytes" not in result.as_dict() for result in several)


@pytest.mark.parametrize("fault", ["too long", "no profiler"])
def test_a_fault_of_the_second_engine_is_found_before_any_call(engine: Clocked, profiled: Profiled, fault: str) -> None:
    small = Clocked()
    small.spec = EngineSpec(vocab_size=50, max_seq_len=8)
    given = [engine, small] if fault == "too long" else [profiled, engine]
    with pytest.raises(UsageError, match="BENCH_TOO_LONG" if fault == "too long" else "PROFILE_UNSUPPORTED"):
        bench(given, prompt=9, tokens=1, profile=fault == "no profiler")
    assert not given[0].calls


def test_a_test_can_be_left_out(engine: Clocked) -> None:
    (result,) = bench([engine], prompt=0, tokens=10, repeats=3, watch=engine.watch)
    assert [rate.test for rate in result.rates] == ["tg10"]
    assert (result.ttft_ms, result.as_dict()["ttft_ms"]) == (None, None)
    (result,) = bench([engine], prompt=20, tokens=0, repeats=3, watch=engine.watch)
    assert ([rate.test for rate in result.rates], result.tpot_ms) == (["pp20"], None)


@pytest.mark.parametrize(("prompt", "tokens", "said"), [(65, 1, "prompt has 65"), (1, 65, "decode test has 65")])
def test_what_does_not_fit_is_refused_before_any_work(engine: Clocked, prompt: int, tokens: int, said: str) -> None:
    with pytest.raises(LlmcError, match="BENCH_TOO_LONG") as caught:
        bench([engine], prompt, tokens)
    assert said in caught.value.what and "64" in caught.value.what
    assert not engine.calls
    engine.slow = 1.0
    bench([engine], 64, 64, repeats=1)


def test_the_document() -> None:
    latency = Latency(1.0, 2.0, 3.0)
    result = module.BenchResult((Rate("pp512", 2.0, 1.0, 3.0),), latency, None, 5, 1, 1000, 0.5, 2)
    assert result.as_dict() == {
        "results": [{"test": "pp512", "tokens_per_s": {"median": 2.0, "min": 1.0, "max": 3.0}}],
        "ttft_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "tpot_ms": None,
        "load_s": 0.5,
        "peak_rss_bytes": 1000,
        "threads": 2,
        "repeats": 5,
        "concurrency": 1,
    }


class Profiled(Clocked):
    """An engine that has a profiler: a kernel call for each token of a forward call, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.warmed: list[int] = []

    def profile(self, work: Callable[[], object], warm_up: Callable[[], object]) -> list[KernelTime]:
        self.calls.clear()
        warm_up()
        self.warmed.append(len(self.calls))
        self.calls.clear()
        work()
        tokens = sum(len(call.tokens) for call in self.calls)
        return [KernelTime("MatMul", tokens, 3.0 * tokens), KernelTime("Add", len(self.calls), 1.0 * tokens)]


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> Profiled:
    made = Profiled()
    made.slow = 1.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: made.now)
    return made


def test_profiles_are_of_the_same_calls(profiled: Profiled) -> None:
    (result,) = bench([profiled], prompt=20, tokens=10, repeats=1, concurrency=2, profile=True)
    prefill, decode = result.profiles
    assert prefill == KernelProfile("pp20", (KernelTime("MatMul", 40, 120), KernelTime("Add", 2, 40)))
    assert decode == KernelProfile("tg10", (KernelTime("MatMul", 20, 60), KernelTime("Add", 10, 20)))
    assert prefill.shares == decode.shares == (0.75, 0.25)
    assert profiled.warmed == [1, 4]


def test_a_profile_only_of_tests_that_run(profiled: Profiled) -> None:
    for prompt, tokens, test in ((20, 0, "pp20"), (0, 10, "tg10")):
        (result,) = bench([profiled], prompt=prompt, tokens=tokens, repeats=1, profile=True)
        assert [profile.test for profile in result.profiles] == [test]
    (result,) = bench([profiled], prompt=20, tokens=10, repeats=1)
    assert result.profiles == ()


def test_an_engine_without_a_profiler_is_refused_before_any_call(engine: Clocked) -> None:
    with pytest.raises(UsageError, match="PROFILE_UNSUPPORTED"):
        bench([engine], prompt=20, tokens=10, profile=True)
    assert not engine.calls
