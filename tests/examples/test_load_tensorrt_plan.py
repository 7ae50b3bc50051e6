"""The example runs a plan without llmc, and its tokens are those of llmc's engine."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from fake_tensorrt import FakeTensorRt
from mock_cuda import MockDriver, Work
from neutral import write_neutral

import llmc
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.tensorrt.engine import TensorRtEngine

EXAMPLES = Path(llmc.__file__).resolve().parent / "examples"


class HostDriver(MockDriver):
    """Takes tensors of torch on the CPU for device memory; work on a stream is done at once."""

    alignment = 1

    def view(self, kind: str, address: int, nbytes: int) -> np.ndarray:
        return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), np.uint8)

    def put(self, stream: int, work: Work) -> None:
        work()

    def is_capturing(self, stream: int) -> bool:
        return False


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import load_tensorrt_plan

    monkeypatch.setattr(load_tensorrt_plan, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(HostDriver()).library().module)
    return load_tensorrt_plan


def test_its_tokens_are_those_of_the_engine(example: ModuleType, tmp_path: Path) -> None:
    manifest = write_neutral(tmp_path / "out")
    driver = MockDriver()
    engine = TensorRtEngine(tmp_path / "out", manifest, driver=driver, find=FakeTensorRt(driver).find)
    prompt = np.random.default_rng(1).integers(3, 70, 40).tolist()  # longer than the plan takes at once
    wanted = [*prompt]
    while len(wanted) < 55:
        wanted.append(int(engine.forward(Batch.one(wanted, logits="last")).argmax()[0]))
    assert example.generate(tmp_path / "out", prompt, 15) == wanted[40:]


def test_it_needs_no_llmc() -> None:
    code = "import sys, load_tensorrt_plan; assert not [name for name in sys.modules if name.startswith('llmc')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLES)
    assert "llmc." not in (EXAMPLES / "load_tensorrt_plan.py").read_text()
