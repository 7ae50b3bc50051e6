"""Tests of the choice of GPUs to build for. Building an engine needs no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llmc.compiler.targets.tensorrt import machine
from llmc.compiler.targets.tensorrt.options import TensorRtOptions
from llmc.errors import LlmcError


def test_compute_capabilities_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def driver(sm: str) -> Any:
        return lambda: type("Driver", (), {"device": type("Device", (), {"sm": sm})})

    def no_driver() -> Any:
        raise LlmcError("CUDA_MISSING", "There is none.")

    monkeypatch.setattr(machine, "open_driver", driver("12.0"))
    assert machine.wanted_sms(TensorRtOptions()) == ["12.0"]
    assert machine.wanted_sms(TensorRtOptions(sm="8.0, 8.6")) == ["8.0", "8.6"]
    monkeypatch.setattr(machine, "open_driver", no_driver)
    assert machine.wanted_sms(TensorRtOptions()) == ["8.9"]


def test_engines_are_built_without_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; import llmc.compiler.finalize; "
    script += "import llmc.compiler.targets.tensorrt.engines, llmc.compiler.targets.tensorrt.worker"
    subprocess.run([sys.executable, "-c", script], check=True)
