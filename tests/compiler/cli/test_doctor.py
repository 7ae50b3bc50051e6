"""`llmc doctor`: its output and exit status."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from click.testing import CliRunner

from llmc.compiler.cli.main import main
from llmc.compiler.inspect import doctor


def test_stdout_is_only_the_document(llmc: Callable[..., CompletedProcess[str]]) -> None:
    done = llmc("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["healthy"]
    assert {target["name"] for target in document["targets"]} == {"ort", "trt"}


def test_the_report_is_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = doctor.Gpu("NVIDIA H200", "9.0", 150_000_000_000)
    monkeypatch.setattr(doctor, "find_gpus", lambda: (gpu,))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout.isascii()
    assert "NVIDIA H200, SM 9.0, 150 GB" in result.stdout
    assert "onnxruntime" in result.stdout


def test_it_fails_if_capture_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine()
    broken = dataclasses.replace(
        report.targets[0], capture=doctor.Answer(False, "torch is missing: pip install 'llmc'")
    )
    monkeypatch.setattr(doctor, "examine", lambda: dataclasses.replace(report, targets=(broken,)))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "no: torch is missing" in result.stdout
