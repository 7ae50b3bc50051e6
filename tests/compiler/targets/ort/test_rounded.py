"""Artifacts for GPUs pass the gate on a CPU, and hold everything in the dtype computed in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import artifact
from engine_contract import CLAUSES, LENGTH, Clause, Subject, broken_runs
from onnx import TensorProto
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.gate.verify import verify, why_not_engine
from llmc.compiler.targets.ort.contrib import CUDA
from llmc.compiler.targets.ort.rounded import open_rounded
from llmc.errors import CheckFailedError, LlmcError
from llmc.runtimes.artifact.manifest import Verified
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.ort.graph import GraphSession

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Both dtypes and all precisions of weights; heads that are normalized, windows, learned positions, experts, slopes, and
# keys and values of different widths, which are no GroupQueryAttention.
MADE: list[tuple[str, dict[str, Any]]] = [
    ("speaking", {}),
    ("speaking", {"dtype": "bf16"}),
    *(("speaking", {"quantize": scheme}) for scheme in ("int8", "int4", "nf4")),
    ("speaking", {"dtype": "bf16", "quantize": "int4"}),
    ("speaking", {"dtype": "bf16", "quantize": "int8"}),
    *((model, {}) for model in ("qwen3", "gemma3_text", "phi3", "gpt2", "mixtral")),
    *((model, {"dtype": "bf16"}) for model in ("gemma3_text", "gpt2", "mixtral", "bloom", "deepseek_v3")),
]


def made(model: str = "speaking", **options: Any) -> Path:
    return artifact(model, device="cuda", **options)


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


@pytest.mark.parametrize(("model", "options"), MADE)
def test_the_gate_passes(model: str, options: dict[str, Any]) -> None:
    folder, dtype = made(model, **options), options.get("dtype", "fp16")
    report = json.loads((folder / "verify.json").read_text())
    assert report["passed"] and report["precision"] == options.get("quantize", dtype)
    manifest = read_manifest(folder)
    assert (manifest.dtype, manifest.section["device"]) == (dtype, "cuda")
    assert {cache.dtype for cache in manifest.caches} == {dtype}
    assert manifest.verified == Verified(here="graph", on_device="gate")
    assert not (folder / "genai_config.json").exists() and not (folder / "prefill.onnx").exists()


@pytest.mark.parametrize(("model", "options"), MADE)
def test_weights_are_in_the_dtype_computed_in(model: str, options: dict[str, Any]) -> None:
    graph = graph_of(made(model, **options))
    kind = KINDS[options.get("dtype", "fp16")]
    stored = {t.name: t.data_type for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
    others = {name for name, found in stored.items() if found not in (kind, TensorProto.UINT8, TensorProto.INT64)}
    # A few small ones are used in float32, as in the model.
    assert all(any(part in name for part in ("slopes", "mlp.gate", "correction_bias")) for name in others), others
    caches = [i.type.tensor_type.elem_type for i in graph.input if i.name.startswith("past_key_values")]
    assert caches and set(caches) == {kind}


def test_the_ops_of_a_graph() -> None:
    ops = Counter(node.op_type for node in graph_of(made()).node)
    assert ops["GroupQueryAttention"] == 2 and ops["SkipSimplifiedLayerNormalization"] > 0
    assert not {"RotaryEmbedding", "Attention", "Softmax", "MatMul"} & ops.keys()
    composed = Counter(node.op_type for node in graph_of(made("bloom", dtype="bf16")).node)
    assert composed["Softmax"] == 2 and composed["Attention"] == composed["GroupQueryAttention"] == 0


def test_kernels_of_gpus_get_no_level_of_accuracy() -> None:
    """On a CPU it would quantize the inputs, and the gate would compare with other numbers than a GPU computes."""
    products = [node for node in graph_of(made(quantize="int4")).node if node.op_type == "MatMulNBits"]
    assert products and not any(a.name == "accuracy_level" for node in products for a in node.attribute)


def test_the_gate_sees_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = CUDA["llmc.fused_attention"]
    monkeypatch.setitem(CUDA, "llmc.fused_attention", lambda g, **call: honest(g, **call | {"window": 3}))
    with pytest.raises(CheckFailedError) as caught:
        llmc.compile(tiny_model("llama"), tmp_path / "out", device="cuda")
    assert caught.value.code == "GATE_FAILED"


@pytest.fixture(scope="module")
def shared() -> Subject:
    tokens = np.random.default_rng(0).integers(3, 72, (4, LENGTH))
    return Subject(open_rounded(made()), tokens, 5e-3, lambda error: broken_runs(GraphSession, error))


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_contract(shared: Subject, clause: Clause) -> None:
    clause(shared)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_verifying_without_a_gpu_runs_the_graph() -> None:
    assert verify(made()).passed
    assert "NVIDIA" in str(why_not_engine(made()))
    assert why_not_engine(artifact("speaking")) is None


def test_outputs_of_layers_are_refused() -> None:
    from llmc.compiler.targets.ort.target import TARGET

    with pytest.raises(LlmcError) as caught:
        TARGET.open_layers(made())
    assert caught.value.code == "LAYERS_UNSUPPORTED"
