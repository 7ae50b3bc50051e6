"""`llmc inspect` of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from click.testing import CliRunner, Result
from progress_lines import phases, rest

from llmc.compiler.cli.main import main
from llmc.ir.printer import from_python


def inspect(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)], env=environment)


def test_stdout_is_only_the_document(llmc: Callable[..., CompletedProcess[str]], llama: str) -> None:
    done = llmc("inspect", llama, "--json", "--print", "--max-seq-len", "64")
    assert (done.returncode, rest(done.stderr)) == (0, "")
    assert phases(done.stderr) == [f"capture {llama}", "passes"]
    document = json.loads(done.stdout)
    assert document["model"] == llama
    assert document["stage"] == "optimized"
    assert document["max_seq_len"] == 64
    assert {p["name"]: p["matches"] for p in document["passes"]}["MatchRmsNorm"] == 5
    assert [group["layers"] for group in document["layers"]][-1] == []
    assert callable(from_python(document["program"]))


def test_the_report_is_plain_text(llama: str) -> None:
    result = inspect(llama, "--until", "canonical")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    lines = result.stdout.splitlines()
    assert "stage        canonical" in lines
    assert result.stdout.isascii()
    head = lines.index("Passes") + 1
    assert lines[head].split() == ["pass", "stage", "matches", "misses", "ms"]
    norms = next(line for line in lines if line.startswith("MatchRmsNorm"))
    assert norms[: lines[head].index("matches") + len("matches")].endswith(" 5")  # aligned to the right of its heading
    assert "model.layers.0-1: the same: " in result.stdout
    assert "rms_norm 2, " in result.stdout
    assert "Reach(optimized)" not in result.stdout


def test_print_prints_only_the_program(llama: str) -> None:
    result = inspect(llama, "--print", "--until", "canonical")
    assert result.stdout.startswith(f"# {llama}, canonical\ndef forward(")
    assert result.stdout.endswith("\n") and not result.stdout.endswith("\n\n")
    assert callable(from_python(result.stdout))


def test_html_and_dump_are_written(llama: str, tmp_path: Path) -> None:
    page, dump = tmp_path / "page.html", tmp_path / "ir"
    result = inspect(llama, "--html", page, "--dump-ir", dump)
    assert result.exit_code == 0
    assert f"Wrote {page}." in result.stdout
    assert "MatchRmsNorm" in page.read_text()
    assert (dump / "00_captured.py").exists()


def test_a_missing_folder_for_the_page_is_refused_before_any_work(tmp_path: Path) -> None:
    result = inspect("no such model", "--html", tmp_path / "absent" / "page.html")
    assert result.exit_code == 2
    assert "There is no folder" in result.stderr


def test_fuel_bounds_the_matches(llama: str) -> None:
    result = inspect(llama, "--json", LLMC_FUEL="3")
    assert sum(p["matches"] for p in json.loads(result.stdout)["passes"]) == 3
    wrong = inspect(llama, LLMC_FUEL="many")
    assert wrong.exit_code == 2
    assert rest(wrong.stderr).startswith("FUEL_INVALID")


def test_passes_before_an_error_are_shown(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.passes import pipeline

    kept = [p for p in pipeline.PIPELINE if p.name not in ("MatchLinear", "FoldScales")]  # FoldScales follows it
    monkeypatch.setattr(pipeline, "PIPELINE", kept)
    result = inspect(llama)
    assert result.exit_code == 4
    assert "MatchRmsNorm" in result.stdout
    assert rest(result.stderr).startswith("IR_INVALID")
    document = json.loads(inspect(llama, "--json").stdout)
    assert document["error"]["code"] == "IR_INVALID"
    assert document["stage"] == "captured"


def test_a_model_that_capture_refuses(llmc: Callable[..., CompletedProcess[str]], mamba: str) -> None:
    done = llmc("inspect", mamba)
    assert (done.returncode, done.stdout) == (3, "")
    assert rest(done.stderr).startswith("CAPTURE_SPECIALIZED")
