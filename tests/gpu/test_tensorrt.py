"""Plans on a real GPU: the contract of engines, the gate, and logits and times beside torch's.

Needs NVIDIA's driver and TensorRT, which builds a plan for the GPU of this machine. Skipped elsewhere.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import engine_contract
import numpy as np
import pytest
import torch
from compiled import artifact, speaking_model
from engine_contract import CLAUSES, LENGTH, Clause, Subject, broken_runs
from transformers import AutoModelForCausalLM

import llmc
from llmc.compiler.finalize import finalize
from llmc.errors import LlmcError
from llmc.runtimes.cache_folder import cache_dir
from llmc.runtimes.cuda.driver import Driver
from llmc.runtimes.cuda.libcuda import open_driver
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.selfcheck import GateReference, check
from llmc.runtimes.engines.tensorrt.engine import TensorRtEngine
from llmc.runtimes.engines.tensorrt.library import find_library
from llmc.runtimes.engines.tensorrt.profile import ProfileRunner

# fp16, with other kernels for prompts than for single tokens.
TOLERANCE = 2e-2
STEPS = 32


@pytest.fixture(scope="module")
def driver() -> Driver:
    try:
        found = open_driver()
        find_library()
    except LlmcError as missing:
        pytest.skip(str(missing))
    return found


@pytest.fixture(scope="module")
def folder(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a plan for this GPU."""
    made = tmp_path_factory.mktemp("gpu") / "out"
    shutil.copytree(artifact("speaking", target="trt", engine=False), made)
    finalize(made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TensorRtEngine]:
    opened = llmc.load(folder, check_device=False)
    assert isinstance(opened, TensorRtEngine)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def subject(engine: TensorRtEngine) -> Subject:
    tokens = np.random.default_rng(0).integers(3, 72, (4, LENGTH))
    return Subject(engine, tokens, TOLERANCE, lambda error: broken_runs(ProfileRunner, error))


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_contract(subject: Subject, clause: Clause) -> None:
    clause(subject)


def test_the_gate(engine: TensorRtEngine, folder: Path) -> None:
    report = check(engine, GateReference.read(folder))
    assert report.passed, report.as_dict()


def test_loading_checks_the_device_once(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    llmc.load(folder).close()
    assert len(list((cache_dir() / "verified").iterdir())) == 1
    opened = llmc.load(folder)
    assert opened.runs == 0
    opened.close()


def test_closing_returns_the_memory(driver: Driver, folder: Path) -> None:
    llmc.load(folder, slots=4).close()  # what the library allocates once for the process
    before = driver.free_memory()
    opened = llmc.load(folder, slots=4)
    assert driver.free_memory() < before
    opened.close()
    assert driver.free_memory() >= before - (1 << 20)


def test_beside_torch(engine: TensorRtEngine, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    model = AutoModelForCausalLM.from_pretrained(speaking_model(), dtype=torch.float16).to("cuda").eval()
    tokens = np.random.default_rng(1).integers(3, 72, 96)
    ids = torch.tensor(tokens[None], device="cuda")
    engine.open_slots(1)
    with torch.inference_mode():
        wanted = model(ids).logits[0].float().cpu().numpy()
        _close(engine.forward(Batch.one(tokens)).numpy(), wanted)
        count = len(tokens) - STEPS
        engine.forward(Batch.one(tokens[:count]))
        for at in range(count, len(tokens)):
            _close(engine.forward(Batch.step(tokens[at : at + 1], np.array([at]))).numpy(), wanted[at : at + 1])
        cache = model(ids[:, :count], use_cache=True).past_key_values

        def torch_step() -> None:
            model(ids[:, count : count + 1], past_key_values=cache, use_cache=True).logits.cpu()
            cache.crop(-1)

        times = {
            "prompt": (lambda: engine.forward(Batch.one(tokens, logits="last")), lambda: model(ids).logits.cpu()),
            "step": (lambda: engine.forward(Batch.step(tokens[:1], np.array([count]))), torch_step),
        }
        with capsys.disabled():
            for name, (ours, theirs) in times.items():
                print(f"\n{name}: TensorRT {_median_ms(ours):.3f} ms, torch {_median_ms(theirs):.3f} ms", end="")


def test_closing(folder: Path) -> None:
    opened = llmc.load(folder, check_device=False)
    engine_contract.closing(Subject(opened, np.full((4, LENGTH), 5), TOLERANCE, lambda error: nullcontext()))


def _close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()) <= TOLERANCE


def _median_ms(call: Callable[[], object], repeats: int = 50) -> float:
    for _ in range(10):
        call()
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return 1000 * float(np.median(spent))
