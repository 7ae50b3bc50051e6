"""`llmc verify`: its output and exit status."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from progress_lines import phases, rest

from llmc.compiler.cli.main import main
from llmc.runtimes.engines.selfcheck import Check, GateReport

GOOD, BAD = Check("prefill: error", 1.25e-6, 1e-4), Check("decode: flips", 0.5, 0.01)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Replace the gate; return the arguments of its last call. It returns the value of `report`."""
    calls: dict[str, object] = {"report": GateReport("fp32", 100, [GOOD])}

    def verify(folder: Path, model: str | None = None) -> object:
        calls.update(folder=folder, model=model)
        return calls["report"]

    module = types.ModuleType("llmc.compiler.gate.verify")
    module.verify = verify  # type: ignore[attr-defined]
    module.why_not_engine = lambda folder: calls.get("why not")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmc.compiler.gate.verify", module)
    return calls


def verify(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


def test_the_table(asked: dict[str, object]) -> None:
    result = verify("out")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert phases(result.stderr) == ["verify out"]
    assert result.stdout.splitlines() == [
        "check           measured  limit   ok",
        "prefill: error  1.25e-06  0.0001  yes",
        "",
        "All checks passed.",
    ]
    assert (asked["folder"], asked["model"]) == (Path("out"), None)


def test_a_graph_that_stands_in_for_an_engine(asked: dict[str, object]) -> None:
    asked["why not"] = "There is no GPU"
    result = verify("out")
    assert result.exit_code == 0 and "All checks passed." in result.stdout
    assert rest(result.stderr).splitlines() == ["Checked the graph, not the engine: There is no GPU."]


def test_a_failed_check_exits_1(asked: dict[str, object]) -> None:
    asked["report"] = GateReport("fp32", 100, [GOOD, BAD])
    result = verify("out", "demo")
    assert result.exit_code == 1
    assert "decode: flips   0.5       0.01    NO" in result.stdout
    assert result.stdout.endswith("1 of 2 checks failed.\n")
    assert asked["model"] == "demo"
    result = verify("out", "--json")
    assert (result.exit_code, json.loads(result.stdout)["passed"]) == (1, False)
