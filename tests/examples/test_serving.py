"""The comparison of many requests at once in examples/compare, without its engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmc
from llmc.runtimes.measure.workload import seeded_workload

COMPARE = Path(llmc.__file__).resolve().parent / "examples" / "compare"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(COMPARE))


class _Clocked:
    """A server that takes a second for each token, and generates `surplus` tokens too many."""

    version, weights = "1", ()

    def __init__(self, surplus: int = 0, concurrency: int = 1) -> None:
        self.now, self.surplus, self.concurrency = 50.0, surplus, concurrency

    def serve(self, requests: Sequence[Any], on_token: Callable[[int, int], None]) -> None:
        for index, request in enumerate(requests):
            for token in range(request.new_tokens + self.surplus):
                self.now += 1
                on_token(index, token)
        self.now += 1000  # what follows the last token is not measured


def test_times_count_from_the_beginning_for_all_requests(monkeypatch):
    import serving_protocol
    from serving_protocol import Request, Served, timed

    server = _Clocked()
    monkeypatch.setattr(serving_protocol, "time", SimpleNamespace(perf_counter=lambda: server.now))
    tokens, served = timed(server, [Request([1], 2), Request([1], 3), Request([1], 1)])
    assert tokens == [[0, 1], [0, 1, 2], [0]]
    assert served == Served(tokens=6, seconds=6.0, ttft_ms=3000.0)  # first tokens after 1, 3 and 6 seconds


@pytest.mark.parametrize("surplus", [-1, 1])
def test_another_number_of_tokens_is_refused(surplus):
    from serving_protocol import Request, timed

    with pytest.raises(RuntimeError, match=f"{2 + surplus} tokens instead of 2 for request 0"):
        timed(_Clocked(surplus), [Request([1], 2), Request([1], 2)])


@pytest.mark.parametrize(("concurrency", "accepted"), [(2, True), (1, False)])
def test_more_requests_at_once_are_refused(concurrency, accepted):
    from serving_protocol import Request, timed

    class Pairs(_Clocked):
        def serve(self, requests: Sequence[Any], on_token: Callable[[int, int], None]) -> None:
            for index in (0, 1, 0, 1, 2, 2):
                on_token(index, 7)

    requests, server = [Request([1], 2)] * 3, Pairs(concurrency=concurrency)
    if accepted:
        assert timed(server, requests)[0] == [[7, 7]] * 3
    else:
        with pytest.raises(RuntimeError, match="2 requests at once instead of 1"):
            timed(server, requests)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_result_has_the_measured_requests_and_the_checks(monkeypatch, tmp_path, capsys, lost):
    import serving_protocol
    from serving_protocol import Server

    loaded = []

    class Toy(Server):
        version, weights = "7", ()

        def __init__(self, *arguments: Any) -> None:
            loaded.append(arguments)
            self.concurrency = arguments[2]

        def serve(self, requests: Sequence[Any], on_token: Callable[[int, int], None]) -> None:
            for index, request in enumerate(requests):
                for token in range(request.new_tokens):
                    on_token(index, 100 * len(request.prompt) + token)

        def measure(self, requests: Sequence[Any]) -> Any:
            served = super().measure(requests)
            return serving_protocol.Served(served.tokens - lost, 2.0, 5.0)

    parts = {"warm_up": [([1, 2], 3)], "measured": [([3], 4), ([4, 5, 6], 6)], "checks": [[7], [7, 8, 9, 10, 11]]}
    (tmp_path / "requests.json").write_text(json.dumps(parts))
    arguments = [str(tmp_path), f"--requests={tmp_path / 'requests.json'}", "--concurrency=2", "--threads=1"]
    monkeypatch.setattr(sys, "argv", ["peer", *arguments])
    if lost:
        with pytest.raises(RuntimeError, match="9 tokens instead of 10"):
            serving_protocol.run("toy", Toy)
        return
    serving_protocol.run("toy", Toy)
    assert loaded == [(tmp_path, 1, 2, 9)]
    result = json.loads(capsys.readouterr().out)
    assert (result["engine"], result["version"], result["requests"], result["concurrency"]) == ("toy", "7", 2, 2)
    assert (result["tokens"], result["seconds"], result["ttft_ms"], result["tokens_per_s"]) == (10, 2.0, 5.0, [5.0])
    assert result["following"] == [100, 500]


def test_requests_are_those_of_the_seeded_workload(tmp_path):
    from serving import write_requests

    (tmp_path / "workload.json").write_text(json.dumps({"check": {"prompt": [1, 2], "expected": [3, 4]}}))
    written = json.loads(write_requests(tmp_path, 1000, 64).read_text())
    expected = [[arrival.prompt.tolist(), arrival.new_tokens] for arrival in seeded_workload(64, 1000)]
    assert written["measured"] == expected
    assert written["checks"] == [[1, 2], [1, 2, 3]]
    measured = {tuple(prompt[:4]) for prompt, _ in written["measured"]}
    assert written["warm_up"] and not measured & {tuple(prompt[:4]) for prompt, _ in written["warm_up"]}


def test_every_variant_has_a_peer_and_files_for_batches():
    from prepare import RECIPES, VARIANTS

    for variant in VARIANTS:
        assert (COMPARE / f"serving_peer_{variant.engine}.py").exists()
        assert variant.for_batches.engine in RECIPES and variant.for_batches.bits == variant.bits
        assert variant.for_batches.for_batches == variant.for_batches


def test_files_for_batches_have_the_logits_of_all_positions(monkeypatch):
    import prepare

    commands = []
    monkeypatch.setattr(prepare, "run_python", lambda python, *arguments: commands.append(list(map(str, arguments))))
    variant = next(variant for variant in prepare.VARIANTS if variant.name == "genai-int8")
    for one in (variant, variant.for_batches):
        prepare.RECIPES["genai"](Path("python"), one.format, Path("hf"), Path("out"))
    assert [command[command.index("-p") + 1] for command in commands] == ["int8", "int8"]
    assert [command[-1] for command in commands] == ["prune_lm_head=true", "prune_lm_head=false"]


def test_files_for_batches_serve_only_batches(tmp_path):
    from prepare import Variant
    from serving import jobs_of
    from turns import Model

    variants = [Variant("llmc", "int8", 8), Variant("genai", "int8", 8, batch_format="other")]
    names = [*variants, variants[1].for_batches]
    model = Model("demo", tmp_path, {one: tmp_path / one.name for one in names}, 9, [1])
    args = SimpleNamespace(concurrency=[1, 8], threads=2, cache=tmp_path)
    python = {"llmc": Path("ours"), "genai": Path("theirs")}
    jobs = jobs_of(model, variants, tmp_path / "requests.json", args, lambda engine, cache: python[engine])
    assert list(jobs.values()) == [1, 1, 8, 8]
    assert [job.variant for job in jobs] == variants * 2
    assert [Path(job.command[2]).name for job in jobs] == ["llmc-int8", "genai-int8", "llmc-int8", "genai-other"]
    assert {job.command[0].name + job.command[1].name for job in jobs} == {
        "oursserving_peer_llmc.py", "theirsserving_peer_genai.py",
    }  # fmt: skip


def _round(engine: str, speed: float, seconds: float = 1.0, ttft_ms: float = 2.0) -> dict[str, Any]:
    return {"engine": engine, "version": "1", "tokens_per_s": [speed], "seconds": seconds, "ttft_ms": ttft_ms}


def test_ratios_are_relative_to_the_best_peer_at_the_same_concurrency():
    from report import Row, serving_table

    rounds = [_round("llmc", 90, 3.0, 10), _round("llmc", 120, 2.0, 30), _round("llmc", 150, 1.0, 20)]
    measured = [
        (8, Row(8, "int8", rounds)),
        (1, Row(8, "int8", [_round("llmc", 50)])),
        (8, Row(8, "Q8_0", [_round("llama.cpp", 100)])),
        (8, Row(8, "int8", [_round("genai", 60)])),
        (8, Row(4, "int4", [_round("genai", 1000)])),
        (1, Row(8, "Q8_0", [_round("llama.cpp", 200)])),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in serving_table(measured).splitlines()[2:]]
    assert lines == [
        ["8", "genai", "int4", "1000 (1000 to 1000)", "1.00", "1.0", "2"],
        ["1", "llmc", "int8", "50 (50 to 50)", "0.25", "1.0", "2"],
        ["1", "llama.cpp", "Q8_0", "200 (200 to 200)", "1.00", "1.0", "2"],
        ["8", "llmc", "int8", "120 (90 to 150)", "1.20", "2.0", "20"],
        ["8", "llama.cpp", "Q8_0", "100 (100 to 100)", "1.00", "1.0", "2"],
        ["8", "genai", "int8", "60 (60 to 60)", "0.60", "1.0", "2"],
    ]


def test_jobs_take_turns_and_a_failure_ends_the_run(tmp_path, monkeypatch):
    import turns
    from prepare import Variant

    jobs = [turns.Job("demo", Variant("llmc", name, 8), name, (name,)) for name in ("a", "b")]
    args = SimpleNamespace(cache=tmp_path, rounds=2, noisy=True)
    ran, checked = [], []

    def run_peer(command: tuple[str, ...]) -> dict[str, int]:
        if len(ran) == 4:
            raise RuntimeError("no")
        ran.append(command[0])
        return {"number": len(ran)}

    monkeypatch.setattr(turns, "run_peer", run_peer)
    results = turns.run_in_turns(jobs, args, lambda job, result: checked.append((job.name, result["number"])))
    assert ran == ["a", "b", "a", "b"] and checked == [("a", 1), ("b", 2), ("a", 3), ("b", 4)]
    assert results == {jobs[0]: [{"number": 1}, {"number": 3}], jobs[1]: [{"number": 2}, {"number": 4}]}
    lines = [json.loads(line) for path in (tmp_path / "results").iterdir() for line in path.read_text().splitlines()]
    assert [(line["model"], line["round"], line["number"]) for line in lines] == [
        ("demo", 0, 1), ("demo", 0, 2), ("demo", 1, 3), ("demo", 1, 4),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="a failed: no"):
        turns.run_in_turns(jobs, args, lambda job, result: None)
