"""`llmc eval --per-layer`: the table, the document, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from compiled import artifact, speaking_model
from progress_lines import phases, rest

from llmc.compiler.cli.main import main

OPTIONS = ["--max-tokens", "120", "--window", "20", "--stride", "10", "--threads", "1"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again; 1234567890 times. " * 2)
    return str(path)


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["model", "artifact"])
def test_the_document(text: str, kind: str) -> None:
    reference = speaking_model() if kind == "model" else artifact("speaking")
    rounded = artifact("speaking", quantize="int4", algo="rtn")
    result = evaluate(rounded, "--reference", reference, "--per-layer", "--text", text, *OPTIONS, "--json")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert phases(result.stderr)[-3:] == ["evaluate", "reference, layers", "layers"]
    document = json.loads(result.stdout)
    assert document["windows"] > 4
    found = document["per_layer"]
    # The first token has no prediction. Each window after the first adds ten tokens.
    assert (found["windows"], found["tokens"]) == (4, 49)
    assert [layer["name"] for layer in found["layers"]] == ["model.layers.0", "model.layers.1"]
    assert all(1e-3 < layer["error"] < 0.5 and 1e-3 < layer["median"] < 0.5 for layer in found["layers"])
    assert found["layers"][0]["added"] is None and 0 < found["layers"][1]["added"] < 0.5


def test_the_table(text: str) -> None:
    given = [artifact("speaking"), "--reference", speaking_model(), "--text", text, *OPTIONS]
    lines = evaluate(*given, "--per-layer").stdout.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("output of"))
    assert lines[head].split() == ["output", "of", "error", "median", "token", "added", "here"]
    rows = [line.split() for line in lines[head + 1 : head + 3]]
    assert [len(row) for row in rows] == [3, 4] and rows[1][0] == "model.layers.1"
    assert all(0 < float(number) < 3e-6 for row in rows for number in row[1:])
    assert lines[-1].endswith("; layers over 49 tokens in 4 windows")
    assert "layers over" not in evaluate(*given).stdout


def test_it_is_refused_without_a_reference() -> None:
    result = evaluate(artifact("speaking"), "--per-layer")
    assert (result.exit_code, "give a --reference" in result.stderr) == (2, True)


def test_a_graph_without_layers_is_refused_before_any_work(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact("speaking")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = node.name.replace(".layers.", ".layers_")
    monkeypatch.setattr(onnx, "load", lambda *a, **k: model)
    result = evaluate(folder, "--reference", "absent", "--per-layer", "--text", text, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == "NO_LAYER_BORDERS"


def test_layers_that_are_not_measured_are_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.compiler.gate import layer_outputs as layer_values
    from llmc.runtimes.measure.layers import LayerReference

    given = layer_values.model_layers

    def less(*arguments: object, **options: object) -> LayerReference:
        found = given(*arguments, **options)  # type: ignore[arg-type]
        return LayerReference([{"model.layers.0": window["model.layers.0"]} for window in found.windows])

    monkeypatch.setattr(layer_values, "model_layers", less)
    options = ["--reference", speaking_model(), "--per-layer", "--text", text, *OPTIONS]
    stdout = evaluate(artifact("speaking"), *options).stdout
    assert "\nmodel.layers.1 is not measured: the reference has no such layer.\n" in stdout
