"""The error of each layer of real artifacts against their models: where it is, and where it is not."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import artifact, speaking_model
from zoo.tiny import tiny_model

from llmc.compiler.frontend.sources import find_source
from llmc.compiler.gate.layer_outputs import artifact_layers, model_layers
from llmc.compiler.targets.ort.layer_outputs import add_layer_outputs
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.ort.layers import LayerOutputEngine
from llmc.runtimes.measure.layers import LayerErrors, LayerReference, measure_layers
from llmc.runtimes.measure.windows import Window

# 100 tokens are for the graph for many tokens where there is one, 20 for the other.
WINDOWS = [Window(np.random.default_rng(n).integers(3, 70, n + 1), 1) for n in (100, 20)]


@functools.cache
def reference(model_type: str) -> LayerReference:
    model = str(speaking_model()) if model_type == "speaking" else find_source(tiny_model(model_type))
    names = layer_engine(artifact(model_type)).graphs_with_outputs["model.onnx"].values
    return model_layers(model, names, WINDOWS)


def layer_engine(folder: Path) -> LayerOutputEngine:
    manifest = read_manifest(folder)
    return LayerOutputEngine(folder, manifest, add_layer_outputs(folder, manifest), threads=1)


def errors(folder: Path, model_type: str) -> LayerErrors:
    return measure_layers(layer_engine(folder), reference(model_type), WINDOWS)


# Norms of two kinds, before and after, parallel blocks, sums with and without a norm after, experts, biases.
@pytest.mark.parametrize("model_type", ["speaking", "gpt2", "gemma2", "olmo2", "falcon", "aria_text", "bart"])
def test_an_unquantized_artifact_is_its_model_at_every_layer(model_type: str) -> None:
    found = errors(artifact(model_type), model_type)
    assert [layer.why for layer in found.layers] == [None, None]
    assert all(0 < layer.error < 3e-6 and 0 < layer.median < 3e-6 for layer in found.layers)  # type: ignore[operator]
    assert [layer.added is None for layer in found.layers] == [True, False]
    assert (found.tokens, found.windows) == (120, 2)


def test_in_plain_onnx_as_well() -> None:
    found = errors(artifact("speaking", ops="standard"), "speaking")
    assert all(0 < layer.error < 3e-6 for layer in found.layers)  # type: ignore[operator]


def test_rounding_shows_in_both_graphs() -> None:
    folder = artifact("speaking", quantize="int4", algo="rtn")
    assert set(layer_engine(folder).graphs_with_outputs) == {"model.onnx", "prefill.onnx"}
    for i, window in enumerate(WINDOWS):
        one = LayerReference([reference("speaking").windows[i]])
        found = measure_layers(layer_engine(folder), one, [window])
        assert all(1e-3 < layer.error < 0.5 for layer in found.layers)  # type: ignore[operator]


@pytest.mark.parametrize("harmed", [0, 1])
def test_a_damaged_weight_shows_first_at_its_layer(harmed: int, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("speaking"), tmp_path / "harmed")
    name = f"model.layers.{harmed}.mlp.down_proj.weight"
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.startswith(name))
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(place["offset"])
        values = np.frombuffer(file.read(place["length"]), np.float32)
        file.seek(place["offset"])
        file.write((values * 1.5).tobytes())
    found = errors(folder, "speaking").layers
    seen = [layer.error > 1e-3 for layer in found]  # type: ignore[operator]
    assert seen == [harmed <= i for i in range(2)]
    if harmed:
        assert found[1].added == pytest.approx(found[1].median, rel=1e-3)
    else:
        assert found[1].added < found[0].median  # type: ignore[operator]


def test_an_artifact_as_the_reference() -> None:
    rounded, plain = artifact("speaking", quantize="int4", algo="rtn"), artifact("speaking")
    against_itself = measure_layers(layer_engine(rounded), artifact_layers(rounded, WINDOWS), WINDOWS)
    assert [(layer.error, layer.median) for layer in against_itself.layers] == [(0, 0), (0, 0)]
    found, model = (
        measure_layers(layer_engine(rounded), artifact_layers(plain, WINDOWS), WINDOWS),
        errors(rounded, "speaking"),
    )
    for one, other in zip(found.layers, model.layers, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)


def test_layers_that_were_dropped_are_not_there() -> None:
    found = errors(artifact("speaking", drop_layers=1, verify=False), "speaking")
    (layer,) = found.layers
    assert (layer.error < 3e-6) == (layer.name == "model.layers.0")  # type: ignore[operator]


def test_a_module_that_is_not_there_is_said() -> None:
    told: list[Any] = []
    known = model_layers(str(speaking_model()), ["model.layers.7"], WINDOWS[:1], watch=lambda *step: told.append(step))
    assert known.windows == [{}]
    assert told == [("reference, layers", 0, 1)]
