"""The engine of plans: graphs, memory, and what a machine is told that can't run a plan."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import artifact
from fake_tensorrt import FakeTensorRt
from mock_cuda import MockDriver
from neutral import PLAN, PROFILES, VOCAB, copy_with_plan, write_neutral

import llmc
from llmc.errors import CheckFailedError, LlmcError
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.cache_folder import cache_dir
from llmc.runtimes.cuda import libcuda
from llmc.runtimes.engines.batch import Batch, NewTokens
from llmc.runtimes.engines.tensorrt import engine as module
from llmc.runtimes.engines.tensorrt.bound_context import CallShape
from llmc.runtimes.engines.tensorrt.engine import TensorRtEngine
from llmc.runtimes.engines.tensorrt.open_plan import OpenPlan
from llmc.runtimes.engines.tensorrt.section import Library, Profile

TOKENS = np.random.default_rng(0).integers(3, VOCAB, (4, 40))


@dataclass
class Machine:
    """A machine with a mock GPU and a fake library, and an artifact."""

    folder: Path
    driver: MockDriver
    fake: FakeTensorRt

    def open(self, slots: int = 1) -> TensorRtEngine:
        manifest = read_manifest(self.folder)
        return TensorRtEngine(self.folder, manifest, slots=slots, driver=self.driver, find=self.fake.find)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make(tmp_path)


def make(tmp_path: Path, library: Library = "tensorrt", memory: int = 1 << 26, **options: Any) -> Machine:
    driver = MockDriver(memory)
    fake = FakeTensorRt(driver, library)
    plan = replace(PLAN, library=library, version=fake.version)
    write_neutral(tmp_path / "out", plans=[plan], **options)
    return Machine(tmp_path / "out", driver, fake)


def step(engine: TensorRtEngine, at: int, *slots: int) -> np.ndarray:
    """Run token `at` of as many sequences as there are slots."""
    return engine.forward(Batch.step(TOKENS[: len(slots), at], np.full(len(slots), at), np.array(slots))).numpy().copy()


def refused(call: Callable[[], Any]) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        call()
    assert "\n" not in str(caught.value) and caught.value.hint
    error = caught.value.with_traceback(None)
    del caught
    gc.collect()  # the frames of the traceback, which keep objects of the library alive
    return error


def test_the_spec(machine: Machine) -> None:
    spec = machine.open().spec
    assert (spec.device, spec.threads, spec.rollback, spec.vocab_size, spec.max_seq_len) == (
        "cuda:0",
        None,
        None,
        VOCAB,
        64,
    )
    assert spec.platform == ("Mock GPU", "CUDA 13.0", "tensorrt 10.15.1.29")


# Graphs ---------------------------------------------------------------------------------------------------------------


def test_a_repeated_call_becomes_a_graph(machine: Machine) -> None:
    engine = machine.open(slots=4)
    counts = []
    for at in range(5):
        step(engine, at, 0, 1)
        counts.append((machine.fake.calls["captured"], machine.driver.calls["launch_graph"]))
    assert counts == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert list(engine.profiles["decode"].graphs) == [CallShape(0, 2, 1, 1)]


def test_other_slots_and_sizes_have_graphs_of_their_own(machine: Machine) -> None:
    engine = machine.open(slots=4)
    for at in range(4):
        for slots in ((0, 1, 2), (0, 1), (1, 2), (3,)):
            step(engine, at, *slots)
    shapes = {(shape.slot, shape.batch) for shape in engine.profiles["decode"].graphs}
    assert shapes == {(0, 2), (1, 2), (0, 3), (3, 1)}
    assert machine.driver.calls["launch_graph"] == 8 and engine.runs == 16


def test_replayed_calls_compute_the_same(machine: Machine) -> None:
    engine = machine.open(slots=2)
    whole = [engine.forward(Batch.one(tokens, slot=0)).numpy().copy() for tokens in TOKENS[:2, :30]]
    for at in range(30):
        got = step(engine, at, 0, 1)
        assert np.allclose(got, np.stack([logits[at] for logits in whole]), rtol=1e-2, atol=1e-2)
    assert machine.driver.calls["launch_graph"] == 28


def test_graphs_are_replayed_in_any_order(machine: Machine) -> None:
    """Each has a context of its own: the library's contexts must not change after a capture."""
    engine = machine.open(slots=3)
    alone = {slot: [] for slot in range(3)}
    for slot, held in alone.items():
        held += [step(engine, at, slot) for at in range(12)]
    for at in range(12):
        for slots in ((0,), (2,), (0, 1), (1,)):
            got = step(engine, at, *slots)
            assert np.allclose(got[0], alone[0][at], rtol=1e-2, atol=1e-2)
    assert machine.driver.calls["launch_graph"] > 50


def test_prompts_are_not_captured(machine: Machine) -> None:
    engine = machine.open()
    for _ in range(4):
        engine.forward(Batch.one(TOKENS[0, :20]))
    assert machine.driver.calls["begin_capture"] == 0


@pytest.mark.parametrize("broken", ["driver", "library", "context"])
def test_where_nothing_can_be_captured_calls_still_work(machine: Machine, broken: str) -> None:
    engine = machine.open()
    machine.driver.captures_work = broken != "driver"
    machine.fake.captures_work = broken != "library"
    machine.fake.fails = "set_optimization_profile_async" if broken == "context" else None
    whole = engine.forward(Batch.one(TOKENS[0, :10])).numpy().copy()
    got = np.concatenate([step(engine, at, 0) for at in range(10)])
    assert np.allclose(got, whole, rtol=1e-2, atol=1e-2)
    tried = 0 if broken == "context" else 1
    assert machine.driver.calls["begin_capture"] == tried and machine.driver.calls["launch_graph"] == 0
    engine.close()
    assert machine.driver.live == {}


def test_graphs_end_with_the_memory_that_they_use(machine: Machine) -> None:
    engine = machine.open(slots=2)
    for at in range(4):
        step(engine, at, 0)
    assert machine.driver.live["executable"] == 1
    engine.open_slots(3)
    assert "executable" not in machine.driver.live
    assert np.isfinite(step(engine, 4, 0)).all()


def test_only_some_graphs_are_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtimes.engines.tensorrt.profile.MOST_GRAPHS", 2)
    engine = machine.open(slots=4)
    for slot in range(4):
        for at in range(3):
            step(engine, at, slot)
    assert machine.driver.live["executable"] == 2
    assert [shape.slot for shape in engine.profiles["decode"].graphs] == [2, 3]


def test_tensorrt_for_rtx_captures_by_itself(tmp_path: Path) -> None:
    machine = make(tmp_path, "tensorrt_rtx")
    engine = machine.open()
    for at in range(4):
        step(engine, at, 0)
    assert machine.fake.strategies == ["DISABLED", "WHOLE_GRAPH_CAPTURE"]
    assert machine.driver.calls["begin_capture"] == 0


def test_each_thread_uses_the_device(machine: Machine) -> None:
    engine = machine.open(slots=2)
    for call in (
        lambda: step(engine, 0, 0),
        lambda: engine.copy_slot(0, 1, 1),
        lambda: engine.open_slots(3),
        engine.close,
    ):
        before = machine.driver.calls["make_current"]
        thread = Thread(target=call)
        thread.start()
        thread.join()
        assert machine.driver.calls["make_current"] > before


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_nothing_is_left_after_close(tmp_path: Path, library: Library) -> None:
    machine = make(tmp_path, library)
    engine = machine.open(slots=3)
    engine.forward(Batch.one(TOKENS[0, :20]))
    for at in range(4):
        step(engine, at, 0, 1)
    engine.copy_slot(0, 2, 3)
    engine.open_slots(5)
    engine.close()
    assert machine.driver.live == {}


def test_logits_that_were_handed_out_outlive_the_engine(machine: Machine) -> None:
    engine = machine.open()
    logits = engine.forward(Batch.one([5])).numpy()
    engine.close()
    assert np.isfinite(logits).all() and machine.driver.live == {"pinned": 1}
    del logits
    assert machine.driver.live == {}


@pytest.mark.parametrize("fails", ["set_optimization_profile_async", None])
def test_an_engine_that_can_not_be_opened_leaves_nothing(machine: Machine, fails: str | None) -> None:
    machine.fake.fails = fails
    slots = 1 if fails else 10**6
    assert refused(lambda: machine.open(slots)).code == ("PLAN_REFUSED" if fails else "CUDA_MEMORY")
    assert machine.driver.live == {}


def test_slots_that_do_not_fit_change_nothing(machine: Machine) -> None:
    engine = machine.open(slots=2)
    first = step(engine, 0, 0)
    assert refused(lambda: engine.open_slots(10**6)).code == "CUDA_MEMORY"
    assert engine.slots == 2 and np.array_equal(step(engine, 0, 0), first)


def test_the_profiles_share_activation_memory(machine: Machine) -> None:
    before = machine.driver.live.get("device", 0)
    engine = machine.open()
    # Weights, activations, four tensors of caches, inputs of two profiles; logits when they are first needed.
    assert machine.driver.live["device"] - before == 1 + 1 + 4 + 2
    step(engine, 0, 0)
    assert machine.driver.live["device"] - before == 9


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_failed_call_names_the_librarys_reason(machine: Machine) -> None:
    engine = machine.open(slots=2)
    want = step(engine, 0, 0)
    for method in ("execute_async_v3", "set_input_shape", "set_tensor_address"):
        machine.fake.fails = method
        error = refused(lambda: step(engine, 0, 1))
        assert error.code == "PLAN_FAILED" and f"{method} is broken" in error.what
        assert "tensorrt 10.15.1.29 failed to" in error.what
        machine.fake.fails = None
        assert np.array_equal(step(engine, 0, 0), want)


def test_files_that_are_no_plan(machine: Machine) -> None:
    (machine.folder / PLAN.file).write_bytes(b"no plan")
    error = refused(machine.open)
    assert error.code == "PLAN_REFUSED" and "engine.plan: Serialization assertion failed." in error.what
    assert f"llmc finalize {machine.folder}" in error.hint and machine.driver.live == {}


def test_a_plan_of_another_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make(tmp_path, profiles={"prefill": Profile(1, 16), "decode": Profile(4, 1)})
    (machine.folder / PLAN.file).write_bytes((machine.folder / PLAN.file).read_bytes().replace(b"[1, 16]", b"[1, 12]"))
    assert "its profile 0 is for 1 sequences of 12 tokens, not for 1 of 16" in refused(machine.open).what
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other")
    opened = OpenPlan.__init__

    def with_another_input(self: OpenPlan, *arguments: Any, tensors: list[str], **options: Any) -> None:
        opened(self, *arguments, tensors=[*tensors, "images"], **options)

    monkeypatch.setattr(OpenPlan, "__init__", with_another_input)
    assert "not those of the artifact (images)" in refused(other.open).what
    assert machine.driver.live == other.driver.live == {}


def test_a_plan_that_is_larger_than_the_free_memory(tmp_path: Path) -> None:
    machine = make(tmp_path, memory=50)
    assert refused(machine.open).code == "CUDA_MEMORY"


def test_a_machine_without_a_gpu_is_told_so_first(tmp_path: Path) -> None:
    libcuda.open_driver.cache_clear()
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    write_neutral(tmp_path / "out", plans=[])
    error = refused(lambda: llmc.load(tmp_path / "out"))
    assert error.code == "CUDA_MISSING" and "needs an NVIDIA GPU and its driver" in error.what
    code = "from llmc.compiler.cli.main import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "run", str(tmp_path / "out"), "Hello"], capture_output=True, text=True
    )
    assert run.returncode == 3 and "CUDA_MISSING" in run.stderr


# Through `load` -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A compiled artifact on a machine where `load` finds a mock GPU."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    driver = MockDriver()
    fake = FakeTensorRt(driver)
    copy_with_plan(artifact("speaking", target="trt", engine=False), tmp_path / "out")
    monkeypatch.setattr(module, "open_driver", lambda: driver)
    monkeypatch.setattr(module, "find_library", fake.find)
    return Machine(tmp_path / "out", driver, fake)


def test_a_compiled_artifact_is_checked_on_the_device_once(compiled: Machine) -> None:
    engine = llmc.load(compiled.folder, slots=2)
    runs = compiled.fake.calls["run"]
    assert runs > 10 and engine.slots == 2 and len(list((cache_dir() / "verified").iterdir())) == 1
    engine.forward(Batch.of(NewTokens([1, 2, 3])))
    engine.close()
    assert compiled.driver.live == {}
    llmc.load(compiled.folder).close()
    assert compiled.fake.calls["run"] == runs + 1


def test_a_plan_that_computes_something_else_is_not_served(compiled: Machine) -> None:
    manifest = read_manifest(compiled.folder)
    graph = compiled.folder / manifest.section["graph"]
    wrong = compiled.folder.parent / "bad"
    wrong.mkdir()
    model = onnx.load(graph)
    scatter = next(node for node in model.graph.node if node.op_type == "TensorScatter")
    scatter.input[2] = "nowhere"  # the key of a layer is always written to the first position
    model.graph.node.insert(0, onnx.helper.make_node("Sub", ["starts", "starts"], ["nowhere"]))
    onnx.save(model, wrong / graph.name)
    plan = compiled.folder / PLAN.file
    plan.write_bytes(plan.read_bytes().replace(str(graph.resolve()).encode(), str(wrong / graph.name).encode()))
    with pytest.raises(CheckFailedError, match="DEVICE_CHECK_FAILED"):
        llmc.load(compiled.folder, check_files=False)
    assert compiled.driver.live == {}


def test_compiled_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    machine = make(tmp_path, "tensorrt_rtx")
    for _ in range(2):
        engine = machine.open()
        step(engine, 0, 0)
        engine.forward(Batch.one(TOKENS[0, :20]))
        engine.close()
    assert machine.fake.caches == [b"kk"] and len(list((tmp_path / "cache" / "tensorrt").iterdir())) == 1


def test_the_profiles_are_those_of_the_section(machine: Machine) -> None:
    engine = machine.open(slots=4)
    assert list(engine.profiles) == ["prefill", "decode"] and PROFILES["decode"].batch == 4
    runs: list[list[int]] = []
    original = engine.around_run

    def around(tokens: Any) -> Any:
        runs.append(list(tokens))
        return original(tokens)

    engine.around_run = around
    engine.forward(
        Batch.of(NewTokens(TOKENS[0, :40]), NewTokens(TOKENS[1, :1], slot=1), NewTokens(TOKENS[2, :1], slot=2))
    )
    assert runs == [[1, 1], [32], [8]]
