"""An engine with caches in device memory, over a driver whose device memory is host memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from compiled import artifact
from engine_contract import CLAUSES, LENGTH, Clause, Subject, broken_runs, closing
from mock_cuda import MockDriver

import llmc
from llmc.errors import LlmcError
from llmc.runtimes.artifact.manifest import CacheSpec
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.cuda import libcuda
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.ort.device import CUDA_PROVIDER, Cpu, Cuda
from llmc.runtimes.engines.ort.engine import OrtEngine
from llmc.runtimes.engines.ort.graph import GraphSession

# Some kernels for CPUs compute parts of an attention in fp16.
TOLERANCE = 2e-2


class HostCuda(Cuda):
    """Computes on the CPU, and keeps caches where the driver does."""

    name = "cpu"

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        return [("CPUExecutionProvider", {})]


@pytest.fixture(autouse=True)
def provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA_PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)


@pytest.fixture
def driver() -> MockDriver:
    return MockDriver()


def opened(driver: MockDriver, slots: int = 1) -> OrtEngine:
    folder = artifact("speaking", device="cuda")
    return OrtEngine(folder, read_manifest(folder), slots=slots, device=HostCuda(driver))


@pytest.fixture(scope="module")
def shared() -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA_PROVIDER])
        patch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
        engine = opened(MockDriver())
    tokens = np.random.default_rng(0).integers(3, 72, (4, LENGTH))
    yield Subject(engine, tokens, TOLERANCE, lambda error: broken_runs(GraphSession, error))
    engine.close()


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_contract(shared: Subject, clause: Clause) -> None:
    clause(shared)


def test_closing(driver: MockDriver) -> None:
    engine = opened(driver)
    tokens = np.full((4, LENGTH), 5)
    closing(Subject(engine, tokens, TOLERANCE, lambda error: broken_runs(GraphSession, error)))
    assert driver.live == {}


def test_the_caches_are_in_device_memory(driver: MockDriver) -> None:
    engine = opened(driver, slots=3)
    caches = read_manifest(engine.folder).caches
    assert driver.used == 3 * sum(cache.nbytes for cache in caches)
    engine.forward(Batch.one(np.arange(3, 9), logits="last"))
    for tensor in engine.caches.bound(0, 1):
        _, heads, length, width = tensor.shape
        held = driver.view("device", tensor.address, 2 * heads * length * width).view(np.float16).reshape(tensor.shape)
        assert np.abs(held[:, :, :6]).min(-1).max() > 0 and not held[:, :, 6:].any()
    engine.close()


def test_too_little_memory(driver: MockDriver) -> None:
    small = MockDriver(memory=5000)
    with pytest.raises(LlmcError) as caught:
        opened(small, slots=9)
    assert caught.value.code == "CUDA_MEMORY" and small.live == {}
    engine = opened(driver)
    with pytest.raises(LlmcError):
        engine.open_slots(1 << 20)
    assert engine.slots == 1 and len(engine.forward(Batch.one(np.arange(3, 9), logits="last")).numpy()) == 1
    engine.close()


def test_what_the_engine_says_of_itself(driver: MockDriver) -> None:
    engine = opened(driver)
    assert engine.spec.device == "cuda:0" and engine.spec.threads is None
    assert engine.spec.platform == ("Mock GPU", "CUDA 13.0", f"onnxruntime {onnxruntime.__version__}")
    assert llmc.load(artifact("speaking")).spec.platform == ()
    engine.close()


@pytest.mark.parametrize(("dtype", "number"), [("fp16", 10), ("bf16", 16)])
def test_what_a_session_binds(driver: MockDriver, dtype: str, number: int) -> None:
    """By its number in ONNX: numpy has no bfloat16."""
    device = Cuda(driver)
    specs = [CacheSpec("static", 2, 8, 8, 32, dtype), CacheSpec("static", 1, 3, 4, 7, dtype)]  # type: ignore[arg-type]
    caches = device.make_caches(specs)
    caches.open(np.zeros(4, np.int64))
    first, later = list(caches.bound(0, 2)), list(caches.bound(2, 2))
    assert [tensor.past for tensor in first[:2]] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert {tensor.element_type for tensor in first} == {number}
    assert [tensor.shape for tensor in first[1:]] == [(2, 2, 32, 8), (2, 1, 7, 3), (2, 1, 7, 4)]
    sizes = [2 * int(np.prod(tensor.shape)) for tensor in first]
    assert [b.address - a.address for a, b in zip(first, later, strict=True)] == sizes, "slots have gaps between them"
    caches.free()
    device.close()
    assert driver.live == {}


def test_the_provider_comes_first_and_its_memory_leaves_room() -> None:
    (name, options), (rest, _) = Cuda(MockDriver()).providers()
    assert (name, rest) == (CUDA_PROVIDER, "CPUExecutionProvider")
    assert options == {"device_id": "0", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    assert Cpu(1).providers() == [("CPUExecutionProvider", {})]


def test_an_onnxruntime_for_cpus(driver: MockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(LlmcError) as caught:
        Cuda(driver)
    error = caught.value
    assert (error.code, error.exit_status) == ("ORT_WITHOUT_CUDA", 3) and "pip install 'llmc[gpu]'" in error.hint
    assert driver.live == {}


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load(driver: MockDriver) -> None:
    """ONNX Runtime would go on without it, on the CPU."""

    class Broken(HostCuda):
        def providers(self) -> list[tuple[str, dict[str, str]]]:
            return [(CUDA_PROVIDER, {}), ("CPUExecutionProvider", {})]

    folder = artifact("speaking", device="cuda")
    with pytest.raises(LlmcError) as caught:
        OrtEngine(folder, read_manifest(folder), device=Broken(driver))
    assert caught.value.code == "ORT_WITHOUT_CUDA" and "can't be loaded" in caught.value.what
    assert driver.live == {}


def test_profiles_of_a_gpu_are_refused(driver: MockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(driver)
    monkeypatch.setattr(engine.device, "name", "cuda")
    with pytest.raises(LlmcError) as caught:
        engine.profile(lambda: None, lambda: None)
    assert caught.value.code == "PROFILE_UNSUPPORTED"
    engine.close()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so_first() -> None:
    libcuda.open_driver.cache_clear()
    with pytest.raises(LlmcError) as caught:
        llmc.load(artifact("speaking", device="cuda"))
    assert caught.value.code == "CUDA_MISSING" and "needs an NVIDIA GPU and its driver" in caught.value.what
    code = "from llmc.compiler.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", str(artifact("speaking", device="cuda")), "hello"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 3 and "CUDA_MISSING" in run.stderr
