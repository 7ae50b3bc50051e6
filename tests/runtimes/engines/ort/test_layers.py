"""Watching layers: the values are those of the window, and what runs is what ran without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from batches import forward
from compiled import artifact

import llmc
from llmc.compiler.targets.ort.layer_outputs import add_layer_outputs
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.ort.device import Cpu
from llmc.runtimes.engines.ort.graph import GraphSession
from llmc.runtimes.engines.ort.layers import GraphWithLayerOutputs, LayerOutputEngine

TOKENS = np.random.default_rng(0).integers(3, 70, 128)


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones, so that a window of a tiny model has two: one for each graph."""
    monkeypatch.setattr(Cpu, "longest_run", 64)


@pytest.fixture(scope="module")
def folder() -> Path:
    return artifact("speaking", quantize="int4", algo="rtn")


@pytest.fixture
def engine(folder: Path) -> LayerOutputEngine:
    manifest = read_manifest(folder)
    return LayerOutputEngine(folder, manifest, add_layer_outputs(folder, manifest), threads=1)


def test_logits_are_those_of_the_artifact(engine: LayerOutputEngine) -> None:
    plain = llmc.load(engine.folder, threads=1)
    for length in (1, 20, 64, 107, 2, 100):
        tokens, starts = TOKENS[None, :length], np.zeros(1, np.int64)
        assert np.array_equal(forward(engine, tokens, starts), forward(plain, tokens, starts))


def test_values_are_vectors_of_all_tokens_even_if_run_in_pieces(
    engine: LayerOutputEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[str] = []
    monkeypatch.setattr(GraphSession, "run", recorded(files))
    long, short = (engine.values(TOKENS[:n]) for n in (107, 64))
    assert files == ["prefill.onnx", "model.onnx", "prefill.onnx"]
    assert engine.layers == list(long) == ["model.layers.0", "model.layers.1"]
    for layer, value in long.items():
        assert value.shape[:2] == (1, 107) and value.dtype == np.float32
        assert np.array_equal(value[:, :64], short[layer])
        assert np.abs(value[0]).sum(1).min() > 0


def recorded(files: list[str]) -> object:
    """A session's `run` that also keeps the name of its graph's file."""
    honest = GraphSession.run

    def run(self: GraphSession, *arguments: object) -> object:
        files.append(self.file)
        return honest(self, *arguments)  # type: ignore[arg-type]

    return run


def test_a_sequence_is_a_new_one_each_time(engine: LayerOutputEngine) -> None:
    first = {layer: value.copy() for layer, value in engine.values(TOKENS[:20]).items()}
    engine.values(TOKENS[20:60])
    again = engine.values(TOKENS[:20])
    assert all(np.array_equal(value, again[layer]) for layer, value in first.items())


def test_what_is_read_from(engine: LayerOutputEngine) -> None:
    assert engine.before["model.layers.1"] == "model.layers.0"
    assert engine.unclear == {}


def test_what_has_no_value_for_each_token(folder: Path) -> None:
    """Of the second layer the step graph gives how many positions each sequence holds, which is [B]."""
    manifest = read_manifest(folder)
    graphs = add_layer_outputs(folder, manifest)
    engine = LayerOutputEngine(folder, manifest, {**graphs, "model.onnx": wrong(graphs["model.onnx"])}, threads=1)
    assert engine.unclear == {}
    assert list(engine.values(TOKENS[:20])) == ["model.layers.0"]
    assert "has the shape [1]" in engine.unclear["model.layers.1"]
    assert list(engine.values(TOKENS[:107])) == ["model.layers.0"], "its second piece is for the step graph"


def wrong(graph: GraphWithLayerOutputs) -> GraphWithLayerOutputs:
    model = onnx.load_from_string(graph.model)
    (held,) = (node.output[0] for node in model.graph.node if node.op_type == "ReduceSum")
    (output,) = (o for o in model.graph.output if o.name == graph.values["model.layers.1"])
    output.name = held
    return replace(graph, model=model.SerializeToString(), values={**graph.values, "model.layers.1": held})
