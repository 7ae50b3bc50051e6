"""`llmc eval`: measurements, output formats and refusals."""

from __future__ import annotations

import json
import math
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from progress_lines import phases, rest
from speaking import WORDS, Counting, stand_in_load, write_speaking

from llmc.compiler.cli.main import main
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.measure.evaluate import EngineReference
from llmc.runtimes.measure.windows import Window

V = len(WORDS)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    stand_in = stand_in_load()
    monkeypatch.setitem(sys.modules, "llmc.runtimes.engines.load", stand_in)
    return stand_in


class Unsure(Counting):
    """A counting engine with half the logits."""

    def forward(self, batch: Batch) -> HostLogits:
        return HostLogits(super().forward(batch).numpy() / 2)


@pytest.fixture
def reference_logits(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("llmc.compiler.gate.reference_logits")

    def reference_of(model: str, windows: list[Window], vocab_size: int, *, watch: Any) -> EngineReference:
        module.asked = (model, len(windows), vocab_size)  # type: ignore[attr-defined]
        return EngineReference(Unsure(), windows)

    module.reference_of = reference_of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmc.compiler.gate.reference_logits", module)
    return module


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking(tmp_path_factory.mktemp("eval") / "out")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text"
    path.write_text(" ".join(f"w{i % 19}" for i in range(100)))
    return str(path)


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def probability(logit: float) -> float:
    """Return the probability of the next word if it has this logit and all others have 0."""
    return math.exp(logit) / (math.exp(logit) + V - 1)


def test_the_document(loaded: types.ModuleType, artifact: Path, text: str) -> None:
    result = evaluate(artifact, "--text", text, "--json", "--threads", "2", "--max-tokens", "19", "--window", "8")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert phases(result.stderr) == [f"read {text}", f"load {artifact}", "evaluate"]
    document = json.loads(result.stdout)
    assert document["perplexity"]["value"] == pytest.approx(1 / probability(1))
    assert (document["tokens"], document["windows"], document["kld"]) == (18, 4, None)
    assert document["text"]["source"] == text and len(document["text"]["sha256"]) == 64
    assert "per_position" not in document
    assert loaded.asked == (artifact, 2, 1)


@pytest.mark.parametrize("kind", ["model", "artifact"])
def test_against_a_reference(
    loaded: types.ModuleType, reference_logits: types.ModuleType, artifact: Path, text: str, tmp_path: Path, kind: str
) -> None:
    given = "org/name" if kind == "model" else str(write_speaking(tmp_path / "other"))
    options = ["--text", text, "--max-tokens", "19", "--window", "8", "--stride", "7", "--per-position"]
    document = json.loads(evaluate(artifact, *options, "--reference", given, "--json").stdout)
    assert document["same_top1"] == {"value": 1, "stderr": 0}
    assert sum(one["tokens"] for one in document["per_position"]) == 18
    if kind == "artifact":
        assert document["kld"]["max"] == 0
        return
    assert reference_logits.asked == ("org/name", 3, read_manifest(artifact).model.vocab_size)
    p, q = probability(0.5), probability(1)
    kld = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert document["kld"]["mean"] == pytest.approx(kld)
    assert document["per_position"][0]["kld"] == pytest.approx(kld)
    assert document["ratio"]["value"] == pytest.approx(p / q)
    assert document["probability_change"]["mean"] == pytest.approx(q - p)
    assert document["same_top5"]["value"] == 1


def test_the_tables(loaded: types.ModuleType, reference_logits: types.ModuleType, artifact: Path, text: str) -> None:
    lines = evaluate(artifact, "--text", text, "--max-tokens", "19").stdout.splitlines()
    assert [line.split() for line in lines[:2]] == [["measure", "value", "±", "error"], ["perplexity", "7.9897"]]
    assert lines[-1].startswith(f"18 tokens in 1 window of {text} (sha256 ")
    lines = evaluate(
        artifact, "--text", text, "--reference", "m", "--per-position", "--window", "8"
    ).stdout.splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in lines}
    assert rows["same best token"] == ["1", "0"]
    p, q = probability(0.5), probability(1)
    assert float(rows["max"][0]) == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-3)
    assert float(rows["p1"][0]) < 0 < float(rows["change of probability"][0]) < float(rows["rms"][0])
    assert sum(line.startswith("7..7 ") for line in lines) == 1
    assert lines[-1].startswith("99 tokens in 24 windows of ")


def test_a_chart(
    loaded: types.ModuleType, reference_logits: types.ModuleType, artifact: Path, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "kld.svg"
    assert evaluate(artifact, "--text", text, "--reference", "demo", "--plot", path).exit_code == 0
    assert "tiny, out against demo" in "".join(ElementTree.parse(path).getroot().itertext())


def test_built_in_texts(loaded: types.ModuleType, artifact: Path) -> None:
    for arguments, source in (([], "docstrings"), (["--text", "topics"], "topics")):
        document = json.loads(evaluate(artifact, *arguments, "--max-tokens", "9", "--json").stdout)
        assert (document["text"]["source"], document["tokens"]) == (source, 8)


def test_wrong_usage(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    for option in (["--per-position"], ["--plot", tmp_path / "a.svg"]):
        result = evaluate(artifact, *option)
        assert (result.exit_code, "give a --reference" in result.stderr) == (2, True)
    result = evaluate(artifact, "--reference", "m", "--plot", tmp_path / "absent" / "a.svg")
    assert (result.exit_code, "There is no folder" in result.stderr) == (2, True)
    assert not hasattr(loaded, "asked")


def test_invalid_measurements_are_refused_before_any_work(
    loaded: types.ModuleType, reference_logits: types.ModuleType, artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("w1")
    (tmp_path / "empty").write_text(" ")
    for arguments, code, status in (
        (["--text", tmp_path / "short"], "TEXT_TOO_SHORT", 3),
        (["--text", tmp_path / "empty"], "TEXT_EMPTY", 3),
        (["--text", tmp_path / "absent"], "TEXT_NOT_FOUND", 3),
        (["--window", "100000"], "WINDOW_INVALID", 2),
        (["--window", "8", "--stride", "8"], "WINDOW_INVALID", 2),
    ):
        result = evaluate(artifact, *arguments, "--reference", "m", "--json")
        assert result.exit_code == status
        assert json.loads(result.stdout)["error"]["code"] == code
    assert not hasattr(loaded, "asked") and not hasattr(reference_logits, "asked")
    assert rest(evaluate(tmp_path / "absent").stderr).startswith("ARTIFACT_NOT_FOUND")
