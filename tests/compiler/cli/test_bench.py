"""`llmc bench`: measurements and output formats."""

from __future__ import annotations

import csv
import io
import json
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from compiled import artifact as compiled
from progress_lines import phases, rest
from speaking import stand_in_load, write_speaking

from llmc.compiler.cli.main import main


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    stand_in = stand_in_load()
    monkeypatch.setitem(sys.modules, "llmc.runtimes.engines.load", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking(tmp_path_factory.mktemp("bench") / "out")


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


SHORT = ["-p", "8", "-n", "4", "-r", "2"]


def test_the_document(loaded: types.ModuleType, artifact: Path) -> None:
    result = bench(artifact, *SHORT, "--output-format", "json", "--concurrency", "2", "--threads", "3")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert phases(result.stderr) == [f"load {artifact}", "pp8", "tg4"]
    document = json.loads(result.stdout)
    assert [r["test"] for r in document["results"]] == ["pp8", "tg4"]
    assert document["results"][0]["tokens_per_s"]["median"] > 0
    assert 0 < document["load_s"] < 10
    assert (document["repeats"], document["concurrency"], document["threads"]) == (2, 2, 3)
    assert loaded.asked == (artifact, 3, 2)


def test_the_table_is_the_default(loaded: types.ModuleType, artifact: Path) -> None:
    lines = bench(artifact, *SHORT).stdout.splitlines()
    assert lines[0] == "| tiny, ort, int8 | tokens/s | min | max |"
    assert lines[-1].startswith("2 runs, 1 sequence, 3 threads, loaded in ")


def test_csv_and_a_chart(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    result = bench(artifact, *SHORT, "--output-format", "csv", "--plot", tmp_path / "bench.svg")
    assert [row["test"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["pp8", "tg4"]
    assert "tiny, ort, int8" in "".join(ElementTree.parse(tmp_path / "bench.svg").getroot().itertext())


def test_wrong_usage(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    assert "nothing to measure" in bench(artifact, "-p", "0", "-n", "0").stderr
    result = bench(artifact, "--plot", tmp_path / "absent" / "bench.svg")
    assert (result.exit_code, "There is no folder" in result.stderr) == (2, True)
    assert not hasattr(loaded, "asked")


def test_an_error_is_also_a_document(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    result = bench(artifact, "-p", "65", "--output-format", "json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["code"] == "BENCH_TOO_LONG"
    assert rest(bench(tmp_path / "absent").stderr).startswith("ARTIFACT_NOT_FOUND")


def test_a_profile_of_each_test() -> None:
    result = bench(compiled("speaking"), *SHORT, "--profile", "--threads", "1", "--output-format", "json")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert phases(result.stderr)[1:] == ["pp8", "tg4", "profile pp8", "profile tg4"]
    prefill, decode = json.loads(result.stdout)["profile"]
    assert (prefill["test"], decode["test"]) == ("pp8", "tg4")
    for profile, runs in ((prefill, 1), (decode, 4)):
        calls = {kernel["kernel"]: kernel["calls"] for kernel in profile["kernels"]}
        assert calls["GroupQueryAttention"] == 2 * runs and len(calls) > 3
        assert all(count % runs == 0 for count in calls.values())
        assert sum(kernel["share"] for kernel in profile["kernels"]) == pytest.approx(1)


def test_a_profile_as_text() -> None:
    result = bench(compiled("speaking"), "-p", "8", "-n", "0", "-r", "1", "--profile", "--threads", "1")
    assert "| pp8, kernel | calls | total ms | share |\n" in result.stdout
    assert "| GroupQueryAttention | 2 | " in result.stdout


def test_an_engine_without_a_profiler(loaded: types.ModuleType, artifact: Path) -> None:
    result = bench(artifact, *SHORT, "--profile")
    assert result.exit_code != 0 and result.stdout == ""
    assert rest(result.stderr).startswith("PROFILE_UNSUPPORTED")


def test_a_workload(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    lines = bench(artifact, "--workload", "6", "--concurrency", "3").stdout.splitlines()
    assert lines[0] == "| tiny, ort, int8 | p50 | p95 | p99 |"
    assert "6 requests" in lines[-2] and "at most 3 at once" in lines[-2] and "times the fewest possible" in lines[-1]
    assert loaded.asked == (artifact, None, 3)
    (tmp_path / "w.jsonl").write_text('{"prompt_tokens": 3, "new_tokens": 4}\n' * 2)
    result = bench(artifact, "--workload", tmp_path / "w.jsonl", "--output-format", "json")
    document = json.loads(result.stdout)
    assert phases(result.stderr) == [f"load {artifact}", "warm-up", "workload"]
    assert (document["requests"], document["tokens"], document["fewest_runs"]) == (2, 8, 8)
    assert document["runs_per_step"] == 1 and document["ttft_ms"]["p99"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "6", "--profile"], "--profile"),
        (["--workload", "6", "--output-format", "csv"], "CSV"),
        (["--rate", "3"], "--workload"),
        (["--workload", "missing.jsonl"], "WORKLOAD_INVALID"),
        (["--workload", "missing.jsonl", "--rate", "3"], "--rate"),
        (["--workload", "0"], "WORKLOAD_INVALID"),
        (["--workload", "3", "--rate", "0"], "--rate"),
    ],
)
def test_options_of_a_workload(loaded: types.ModuleType, artifact: Path, arguments: list[str], message: str) -> None:
    result = bench(artifact, *arguments)
    assert (result.exit_code, result.stdout) == (2, "") and message in result.stderr
