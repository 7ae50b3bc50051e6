"""Small neutral artifacts with plans of `fake_tensorrt`: of a decoder in ONNX with random weights, or compiled ones."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import artifacts
import fake_tensorrt
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmc.runtimes.artifact.decode import encode
from llmc.runtimes.artifact.hashing import sha256
from llmc.runtimes.artifact.manifest import MANIFEST, CacheSpec, FileSpec, Manifest, ModelSpec, Phase
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.artifact.write import ArtifactWriter
from llmc.runtimes.engines.tensorrt.section import DATA, GRAPH, Plan, Profile, TensorRtSection, read_section
from llmc.runtimes.engines.tensorrt.section import PROFILES as ORDER

VOCAB, WIDTH, LAYERS, HEADS, HEAD_DIM = 72, 32, 2, 2, 16
PROFILES = {"prefill": Profile(1, 32), "decode": Profile(4, 1)}
PLAN = Plan("engine.plan", "tensorrt", "10.15.1.29", ["8.9"], "engine.json")


def graph(length: int) -> onnx.ModelProto:
    """Return a decoder with learned positions, so that every wrong position changes the logits."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int, scale: float = 1.0) -> str:
        values = random.normal(scale=scale, size=shape).astype(np.float16)
        constants.append(numpy_helper.from_array(values, name))
        return name

    def number(name: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(op: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [out], **attributes))
        return out

    zero, one = number("zero", 0), number("one", 1)
    size = node("Gather", node("Shape", "input_ids", out="shape"), one, out="size")
    steps = node("Range", zero, size, one, out="steps")
    positions = node("Add", node("Unsqueeze", "starts", one, out="column"), steps, out="positions")
    every = number("every", np.arange(length))
    wide = node("Unsqueeze", positions, number("axes", [1, 3]), out="wide")
    mask = node("LessOrEqual", every, wide, out="mask")  # [B, 1, S, T]
    x = node(
        "Add",
        node("Gather", weight("embedding", VOCAB, WIDTH), "input_ids", out="embedded"),
        node("Gather", weight("places", length, WIDTH), positions, out="placed"),
        out="x",
    )
    split = number("split", [0, 0, HEADS, HEAD_DIM])
    join = number("join", [0, 0, WIDTH])
    for layer in range(LAYERS):
        heads = []
        for part in "qkv":
            flat = node("MatMul", x, weight(f"{part}{layer}", WIDTH, WIDTH, scale=0.3), out=f"{part}{layer}.flat")
            parts = node("Reshape", flat, split, out=f"{part}{layer}.parts")
            heads.append(node("Transpose", parts, out=f"{part}{layer}.heads", perm=[0, 2, 1, 3]))
        caches = [
            node(
                "TensorScatter", f"past_key_values.{layer}.{role}", new, "starts", out=f"present.{layer}.{role}", axis=2
            )
            for role, new in zip(("key", "value"), heads[1:], strict=True)
        ]
        y = node("Attention", heads[0], *caches, mask, out=f"y{layer}")
        back = node("Transpose", y, out=f"y{layer}.back", perm=[0, 2, 1, 3])
        o = node(
            "MatMul",
            node("Reshape", back, join, out=f"y{layer}.flat"),
            weight(f"o{layer}", WIDTH, WIDTH, scale=0.3),
            out=f"o{layer}.out",
        )
        x = node("Add", x, o, out=f"x{layer}")
    last = node("Gather", x, "rows", out="last", axis=1)
    logits = node("MatMul", last, weight("head", WIDTH, VOCAB, scale=0.3), out="logits16")
    node("Cast", logits, out="logits", to=TensorProto.FLOAT)

    def value(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    cache = ("B", HEADS, length, HEAD_DIM)
    names = [(layer, role) for layer in range(LAYERS) for role in ("key", "value")]
    inputs = [
        value("input_ids", TensorProto.INT64, "B", "S"),
        value("starts", TensorProto.INT64, "B"),
        value("rows", TensorProto.INT64, "R"),
        *(value(f"past_key_values.{layer}.{role}", TensorProto.FLOAT16, *cache) for layer, role in names),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, "B", "R", VOCAB),
        *(value(f"present.{layer}.{role}", TensorProto.FLOAT16, *cache) for layer, role in names),
    ]
    made = helper.make_graph(nodes, "neutral", inputs, outputs, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def section(plans: list[Plan] | None = None, profiles: dict[str, Profile] = PROFILES) -> TensorRtSection:
    """Return a section with one plan, unless others are given."""
    return TensorRtSection(GRAPH, "fp16", profiles, [PLAN] if plans is None else plans)


def write_plan(folder: Path, plan: Plan, path: Path, profiles: dict[str, Profile]) -> None:
    """Write the files of a plan for the graph at a path."""
    (folder / plan.file).write_bytes(fake_tensorrt.plan_bytes(path, *(profiles[name] for name in ORDER)))
    (folder / plan.record).write_bytes(b"{}")


def copy_with_plan(compiled: Path, final: Path, plan: Plan = PLAN) -> Manifest:
    """Copy an artifact that was compiled without a plan, and add one."""
    shutil.copytree(compiled, final)
    write_plan(final, plan, final.resolve() / GRAPH, read_section(read_manifest(final)).profiles)
    return add_plan(final, plan)


def add_plan(folder: Path, plan: Plan) -> Manifest:
    """Write into the manifest of an artifact that it has a plan, whose files are there."""
    manifest = read_manifest(folder)
    own = read_section(manifest)
    added = {name: FileSpec(sha256(folder / name), (folder / name).stat().st_size) for name in (plan.file, plan.record)}
    changed = replace(manifest, section=encode(replace(own, plans=[plan])), files=manifest.files | added)
    (folder / MANIFEST).write_bytes(changed.to_json())
    return changed


def write_neutral(
    final: Path,
    *,
    length: int = 64,
    plans: list[Plan] | None = None,
    profiles: dict[str, Profile] = PROFILES,
    reference: Any = None,
    **changes: Any,
) -> Manifest:
    """Write an artifact whose plans are those of `fake_tensorrt`.

    Args:
        reference: a `GateReference` to store in it.
    """
    cache = CacheSpec("static", HEADS, HEAD_DIM, HEAD_DIM, length, "fp16")
    own = section(plans, profiles)
    with ArtifactWriter(final) as writer:
        onnx.save(graph(length), writer.folder / GRAPH)
        (writer.folder / DATA).write_bytes(b"")
        for plan in own.plans:
            write_plan(writer.folder, plan, final.resolve() / GRAPH, profiles)
        if reference is not None:
            reference.save(writer.folder)
        fields: dict[str, Any] = {
            "target": "trt",
            "model": ModelSpec("tiny", "neutral", "one", VOCAB, LAYERS, 1234),
            "max_seq_len": length,
            "phases": {"step": Phase(1)},
            "caches": [cache] * LAYERS,
            "quantization": None,
            "section": asdict(own),
        }
        return writer.commit(artifacts.manifest(**(fields | changes)))
