"""The neutral artifact keeps the contract of an engine and passes the gate; the gate sees mistakes in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import artifact
from engine_contract import CLAUSES, LENGTH, Clause, Subject, broken_runs, closing
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.targets.onnx.lower import Lowering
from llmc.compiler.targets.tensorrt.neutral import NeutralEngine, open_neutral
from llmc.compiler.targets.tensorrt.ops import TENSORRT, cached_attention
from llmc.errors import CheckFailedError
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.selfcheck import GateReference, check

# fp16 and bf16, all precisions of weights; experts, slopes, learned positions, windows, sinks, capped scores.
MADE: list[tuple[str, dict[str, Any]]] = [
    ("speaking", {}),
    ("speaking", {"dtype": "bf16"}),
    *(("speaking", {"quantize": quantize}) for quantize in ("int8", "int4", "fp8", "w8a8")),
    ("speaking", {"dtype": "bf16", "quantize": "int4"}),
    *((model, {"dtype": "bf16"}) for model in ("gemma2", "gemma3_text", "gpt2", "bloom", "mixtral", "gpt_oss")),
    *((model, {}) for model in ("qwen3", "phi3", "qwen3_moe", "deepseek_v3")),
]


@pytest.mark.parametrize(("model", "options"), MADE)
def test_the_gate_passes(model: str, options: dict[str, Any]) -> None:
    folder = artifact(model, target="trt", engine=False, **options)
    report = json.loads((folder / "verify.json").read_text())
    assert report["passed"] and report["precision"] == options.get("quantize", options.get("dtype", "fp16"))
    assert read_manifest(folder).dtype == options.get("dtype", "fp16")


def test_attentions_of_the_same_queries_are_written_in_basic_ops() -> None:
    """TensorRT for RTX 1.7 crashes while it builds two of them."""
    for model, expected in (("llama", 2), ("diffllama", 0)):
        graph = weights_of(artifact(model, target="trt", engine=False)).graph
        assert len(list(nodes(graph, "Attention"))) == expected, model


def subject(**options: Any) -> Subject:
    engine = open_neutral(artifact("speaking", target="trt", engine=False, **options))
    tokens = np.random.default_rng(0).integers(3, 72, (4, LENGTH))
    return Subject(engine, tokens, 5e-3, lambda error: broken_runs(NeutralEngine, error))


@pytest.fixture(scope="module")
def shared() -> Subject:
    return subject()


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_contract(shared: Subject, clause: Clause) -> None:
    clause(shared)


def test_closing() -> None:
    closing(subject())


def weights_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def failed(folder: Path, change: Any, tmp_path: Path) -> set[str]:
    """Return the names of the gate's checks that fail after a change to the graph."""
    model = onnx.load(folder / "model.onnx")
    change(model.graph)
    copy = tmp_path / "out"
    copy.mkdir()
    onnx.save(model, copy / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    report = check(NeutralEngine(copy, read_manifest(folder)), GateReference.read(folder))
    return {one.name for one in report.checks if not one.ok}


ALL = {
    "prompts",
    "a ragged batch, token by token",
    "a prompt in pieces",
    "pieces beside other sequences",
}


def nodes(graph: onnx.GraphProto, kind: str) -> Iterator[onnx.NodeProto]:
    return (node for node in graph.node if node.op_type == kind)


def mask_off_by_one(graph: onnx.GraphProto) -> None:
    next(nodes(graph, "LessOrEqual")).op_type = "Less"


def cache_written_one_slot_late(graph: onnx.GraphProto) -> None:
    one = onnx.numpy_helper.from_array(np.array([1]), "one")
    graph.initializer.append(one)
    graph.node.insert(0, onnx.helper.make_node("Add", ["starts", "one"], ["late"]))
    for node in nodes(graph, "TensorScatter"):
        node.input[2] = "late"


def swapped_keys_and_values(graph: onnx.GraphProto) -> None:
    for node in nodes(graph, "Attention"):
        node.input[1], node.input[2] = node.input[2], node.input[1]


def wrong_scale(graph: onnx.GraphProto) -> None:
    """One weight of a layer has scales that are half as large again."""
    name = list(nodes(graph, "DequantizeLinear"))[1].input[1]
    (scales,) = (tensor for tensor in graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(scales)
    scales.CopyFrom(onnx.numpy_helper.from_array((values * 1.5).astype(values.dtype), name))


@pytest.mark.parametrize("change", [mask_off_by_one, cache_written_one_slot_late, swapped_keys_and_values])
def test_the_gate_sees_a_mistake_in_the_graph(change: Any, tmp_path: Path) -> None:
    assert failed(artifact("speaking", target="trt", engine=False), change, tmp_path) == ALL


def test_the_gate_sees_a_wrong_scale(tmp_path: Path) -> None:
    folder = artifact("speaking", target="trt", engine=False, quantize="int8")
    assert {f"{name}, rounded alike" for name in ALL} <= failed(folder, wrong_scale, tmp_path)


def test_a_lowering_that_forgets_the_window_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(g: Lowering, window: int | None, **others: Any) -> Any:
        return cached_attention(g, window=None, **others)

    monkeypatch.setitem(TENSORRT, "llmc.cached_attention", forgets)
    with pytest.raises(CheckFailedError, match="GATE_FAILED"):
        llmc.compile(tiny_model("gemma3_text"), tmp_path / "out", target="trt", engine=False)
    assert not (tmp_path / "out").exists()
