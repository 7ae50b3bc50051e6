"""`llmc finalize`: its output and exit status, with real engines where the library is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from compiled import artifact
from progress_lines import phases, rest

from llmc.compiler.cli.main import main
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.tensorrt.section import read_section


@pytest.fixture
def neutral(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    shutil.copytree(artifact("speaking", target="trt", engine=False), folder)
    return folder


def finalize(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["finalize", *map(str, arguments)])


def test_an_engine_is_built(neutral: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = finalize(neutral, "--sm", "8.6,8.9", "--max-batch-size", "4")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert any(phase.startswith("engine: about ") for phase in phases(result.stderr))
    section = read_section(read_manifest(neutral))
    assert section.plans[0].sms == ["8.6", "8.9"] and section.profiles["decode"].batch == 4
    lines = result.stdout.splitlines()
    assert (
        lines[0].startswith(f"artifact  {neutral}: ") and lines[-1] == f"To see what was built: llmc inspect {neutral}"
    )
    shown = CliRunner().invoke(main, ["inspect", str(neutral)])
    assert shown.exit_code == 0
    assert "compute capabilities  8.6, 8.9" in shown.stdout and "1 to 4" in shown.stdout


def test_a_document(neutral: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = finalize(neutral, "--json")
    document = json.loads(result.stdout)
    assert document["path"] == str(neutral) and "engine.plan" in document["manifest"]["files"]


def test_an_artifact_that_runs_as_it_is() -> None:
    result = finalize(artifact("speaking"))
    assert result.exit_code == 2 and "FINALIZE_UNSUPPORTED" in result.stderr


def test_a_library_that_is_missing(neutral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtimes.engines.tensorrt.library.installed_libraries", list)
    before = read_manifest(neutral)
    result = finalize(neutral)
    assert result.exit_code == 3 and "TENSORRT_MISSING" in result.stderr and "Traceback" not in result.stderr
    assert read_manifest(neutral) == before


def test_a_misspelt_compute_capability(neutral: Path) -> None:
    result = finalize(neutral, "--sm", "ada")
    assert result.exit_code == 2 and "CONFIG_INVALID" in result.stderr
