"""Watching layers: the values are those of the window, and what runs is what ran without."""

from __future__ import annotations

import numpy as np
import pytest
from compiled import artifact

import llmc
from llmc.compiler.targets.ort.layer_outputs import watch_layers
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.ort import engine as ort
from llmc.runtimes.engines.ort.layers import WatchedEngine
from llmc.runtimes.measure.windows import Window

TOKENS = np.random.default_rng(0).integers(3, 70, 128)


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones, so that a window of a tiny model has two: one for each graph."""
    monkeypatch.setattr(ort, "_PIECE", 64)


@pytest.fixture(scope="module")
def engine() -> WatchedEngine:
    folder = artifact("speaking", quantize="int4", algo="rtn")
    manifest = read_manifest(folder)
    return WatchedEngine(folder, manifest, watch_layers(folder, manifest), threads=1)


def test_logits_are_those_of_the_artifact(engine: WatchedEngine) -> None:
    plain = llmc.load(artifact("speaking", quantize="int4", algo="rtn"), threads=1)
    for length in (1, 20, 64, 107, 2, 100):
        tokens, starts = TOKENS[None, :length], np.zeros(1, np.int64)
        assert np.array_equal(engine.forward(tokens, starts), plain.forward(tokens, starts))


def test_values_are_rows_for_all_tokens_also_where_they_run_in_pieces(engine: WatchedEngine) -> None:
    long, short = (engine.values(Window(TOKENS[:n], 1)) for n in (108, 65))
    assert set(engine._graphs) == {"step", "prefill"}
    assert list(long) == ["model.layers.0", "model.layers.1"]
    for layer, value in long.items():
        assert value.shape[:2] == (1, 107) and value.dtype == np.float32
        assert np.array_equal(value[:, :64], short[layer])
        assert np.abs(value[0]).sum(1).min() > 0


def test_what_is_read_from_and_what_has_no_rows(engine: WatchedEngine) -> None:
    assert engine.before["model.layers.1"] == "model.layers.0"
    assert engine.unclear == {}
    layers = engine._graph(20)
    run = layers.run
    layers.run = lambda *a: (run(*a), layers.seen.update({"model.layers.1": np.zeros((7, 3))}))[0]  # type: ignore[method-assign]
    try:
        assert list(engine.values(Window(TOKENS[:21], 1))) == ["model.layers.0"]
        assert "has the shape [7, 3]" in engine.unclear["model.layers.1"]
    finally:
        del layers.run
        engine._odd.clear()
