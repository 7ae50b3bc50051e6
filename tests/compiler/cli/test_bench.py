"""`llmc bench`: measurements and output formats."""

from __future__ import annotations

import csv
import io
import json
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from compiled import artifact as compiled
from progress_lines import phases, rest
from speaking import Counting, stand_in_load, write_speaking

from llmc.compiler.cli.main import main
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.spec import EngineSpec


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


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("several")
    return [write_speaking(folder / "one"), write_speaking(folder / "two")]


def test_several_artifacts_are_one_table(loaded: types.ModuleType, both: list[Path]) -> None:
    result = bench(*both, *SHORT)
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert phases(result.stderr) == [f"load {both[0]}", f"load {both[1]}", "pp8", "tg4"]
    lines = result.stdout.splitlines()
    starts = [line.split(" | ")[:2] for line in lines[2:6]]
    assert starts == [["| one", "pp8"], ["| one", "tg4"], ["| two", "pp8"], ["| two", "tg4"]]
    assert lines[-1] == "2 runs in turn, 1 sequence, 3 threads"


def test_the_document_of_several_artifacts(loaded: types.ModuleType, both: list[Path], artifact: Path) -> None:
    document = json.loads(bench(*both, *SHORT, "--output-format", "json").stdout)
    assert list(document) == ["artifacts"]
    first, second = document["artifacts"]
    assert (first["artifact"], second["artifact"]) == ("one", "two")
    one = json.loads(bench(artifact, *SHORT, "--output-format", "json").stdout)
    assert {*first} == {*one} - {"peak_rss_bytes"} | {"artifact"}
    assert [r["test"] for r in second["results"]] == ["pp8", "tg4"]


def test_csv_and_a_chart_of_several_artifacts(loaded: types.ModuleType, both: list[Path], tmp_path: Path) -> None:
    result = bench(*both, *SHORT, "--output-format", "csv", "--plot", tmp_path / "bench.svg")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["artifact"], row["test"]) for row in rows] == [
        ("one", "pp8"), ("one", "tg4"), ("two", "pp8"), ("two", "tg4"),
    ]  # fmt: skip
    texts = [text.text for text in ElementTree.parse(tmp_path / "bench.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("one") == texts.count("two") == 2


def test_folders_of_the_same_name(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    other = write_speaking(tmp_path / artifact.name)
    documents = json.loads(bench(artifact, other, *SHORT, "--output-format", "json").stdout)["artifacts"]
    assert [document["artifact"] for document in documents] == [str(artifact), str(other)]


def test_a_wrong_folder_is_found_before_anything_is_loaded(
    loaded: types.ModuleType, artifact: Path, tmp_path: Path
) -> None:
    result = bench(artifact, tmp_path / "absent", *SHORT)
    assert (result.exit_code, rest(result.stderr).split(":")[0]) == (3, "ARTIFACT_NOT_FOUND")
    assert not hasattr(loaded, "asked")
    assert bench(*SHORT).exit_code == 2


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
    lines = bench(artifact, "--workload", "6", "--concurrency", "3", "-r", "2").stdout.splitlines()
    assert lines[0] == "| tiny, ort, int8 | p50 | p95 | p99 |"
    assert (
        "in 2 runs): 6 requests" in lines[-2]
        and "at most 3 at once" in lines[-2]
        and "times the fewest possible" in lines[-1]
    )
    assert loaded.asked == (artifact, None, 3)
    (tmp_path / "w.jsonl").write_text('{"prompt_tokens": 3, "new_tokens": 4}\n' * 2)
    result = bench(artifact, "--workload", tmp_path / "w.jsonl", "--output-format", "json")
    document = json.loads(result.stdout)
    assert phases(result.stderr) == [f"load {artifact}", "warm-up", "workload"]
    assert (document["requests"], document["tokens"], document["fewest_runs"]) == (2, 8, 8)
    assert document["runs_per_step"] == 1 and document["ttft_ms"]["p99"] is None
    assert document["repeats"] == 5
    assert document["tokens_per_s_min"] <= document["tokens_per_s"] <= document["tokens_per_s_max"]


def test_a_workload_for_several_artifacts(loaded: types.ModuleType, both: list[Path]) -> None:
    result = bench(*both, "--workload", "6", "--concurrency", "3", "-r", "2")
    assert phases(result.stderr) == [f"load {both[0]}", f"load {both[1]}", "warm-up", "workload"]
    lines = result.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines[:4]] == ["| artifact", "|---|" + "---:|" * 13, "| one", "| two"]
    assert lines[-1] == "2 runs in turn: 6 requests, at most 3 at once"
    document = json.loads(bench(*both, "--workload", "6", "-r", "1", "--output-format", "json").stdout)
    assert [(one["artifact"], one["requests"]) for one in document["artifacts"]] == [("one", 6), ("two", 6)]


def test_a_trace_of_the_last_time(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = bench(artifact, "--workload", "5", "--concurrency", "2", "-r", "3", "--trace", path)
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert names.count("forward") == names.count("step") == int(result.stdout.split(" graph runs in ")[1].split()[0])
    assert {name for name in names if name.startswith("request")} == {f"request {number}" for number in range(5)}


def test_a_trace_has_the_runs_of_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = bench(
        compiled("speaking"), "--workload", "4", "--concurrency", "2", "-r", "1", "--threads", "1", "--trace", path
    )
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    slices = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    forwards, runs = ([one for one in slices if one["name"] == name] for name in ("forward", "run"))
    assert len(runs) == sum(forward["args"]["runs"] for forward in forwards) > len(forwards)
    for forward in forwards:
        end = forward["ts"] + forward["dur"]
        inside = [run["args"] for run in runs if forward["ts"] <= run["ts"] < end]
        assert sum(sum(args["tokens_per_sequence"]) for args in inside) == forward["args"]["tokens"]


def test_options_of_a_trace(loaded: types.ModuleType, both: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert "Set --workload, too." in bench(both[0], "--trace", path).stderr
    assert "Give one DIR." in bench(*both, "--workload", "3", "--trace", path).stderr
    result = bench(both[0], "--workload", "3", "--trace", tmp_path / "absent" / "trace.json")
    assert (result.exit_code, "There is no folder" in result.stderr) == (2, True)
    assert not hasattr(loaded, "asked") and not path.exists()


def test_all_artifacts_get_the_same_requests(loaded: types.ModuleType, both: list[Path]) -> None:
    """Those have only tokens that all know."""
    load, seen = loaded.load, []

    class Small(Counting):
        spec = EngineSpec(3, 64, threads=3)

        def forward(self, batch: Batch) -> HostLogits:
            seen.extend(batch.tokens.tolist())
            return HostLogits(np.zeros((len(batch.wanted), 3), np.float32))

    loaded.load = lambda path, **options: Small() if path == both[1] else load(path, **options)
    result = bench(*both, "--workload", "6", "-r", "1")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert max(seen) == 2


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
