"""The files of an artifact: two graphs over the same numbers, held to the standard, the same bytes each time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model
from zoo.tiny import tiny_model

import llmc
from llmc import LlmcError, Program, Stage
from llmc.compiler.backends.onnx import build
from llmc.compiler.backends.onnx.build import DATA, PREFILL_ROWS, build_onnx, cache_specs
from llmc.compiler.backends.onnx.external import LINE
from llmc.compiler.config import CompileConfig
from llmc.kernels.ops.quantized import decode
from llmc.passes.pipeline import MANY_ROWS
from llmc.runtimes.derive import derive
from llmc.runtimes.manifest import DerivedSpec, GraphSpec


@pytest.fixture(scope="module")
def optimized() -> Program:
    return llmc.capture(tiny_model("llama"), until=Stage.OPTIMIZED)


def built(optimized: Program, folder: Path, **options: Any) -> tuple[Program, dict[str, GraphSpec]]:
    config = CompileConfig(**options)
    program = run_passes_of(optimized, config)
    folder.mkdir(exist_ok=True)
    return program, build_onnx(program, folder, ops=config.ops, prefill=config.rounds_prefill)


def run_passes_of(optimized: Program, config: CompileConfig) -> Program:
    program = optimized.copy()
    for subject in config.engine_passes():
        subject(program)
    return program


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_graphs_hold_the_same_integers(optimized: Program, tmp_path: Path, scheme: str) -> None:
    program, graphs = built(optimized, tmp_path, quantize=scheme, **({"group_size": 16} if scheme == "int4" else {}))
    assert {name: (g.file, g.min_rows, g.max_rows) for name, g in graphs.items()} == {
        "step": ("model.onnx", 1, PREFILL_ROWS - 1),
        "prefill": ("prefill.onnx", PREFILL_ROWS, None),
    }
    many = program.copy()
    for subject in MANY_ROWS:
        subject(many)
    step = initializers(tmp_path / "model.onnx")
    assert len(graphs["prefill"].derived) == 10  # qkv, o, gate, up, down, in two layers
    negative = False
    for spec in graphs["prefill"].derived:
        codes = spec.name.removesuffix(".columns")
        before, _, behind = codes.rpartition("codes")
        parts = [f"{before}{part}{behind}" for part in ("codes", "scales", "multiples")]
        packed, scales, multiples = (many.weights[n].evaluate() if n in many.weights else None for n in parts)
        whole = decode(packed, None, scheme, spec.group_size, torch.float64, multiples).flatten(1)
        matrix = derive(tmp_path, spec)
        assert matrix.dtype == np.int8 and matrix.flags.c_contiguous
        assert np.array_equal(matrix, whole.T.numpy())
        # What the step graph's kernel makes of codes and scales is the same weight, up to a scale's last digit.
        used = step_weight(tmp_path, step, spec)
        torch.testing.assert_close(torch.from_numpy(used), whole.float() * scales, rtol=1e-6, atol=0)
        negative |= multiples is not None and bool((multiples < 0).any())
    assert negative == (scheme == "int4")


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}


def read(folder: Path, tensor: onnx.TensorProto, dtype: Any) -> np.ndarray:
    at = {e.key: e.value for e in tensor.external_data}
    assert at["location"] == DATA and int(at["offset"]) % LINE == 0
    return (
        np.fromfile(folder / DATA, np.uint8, int(at["length"]), offset=int(at["offset"]))
        .view(dtype)
        .reshape(tensor.dims)
    )


def step_weight(folder: Path, step: dict[str, onnx.TensorProto], spec: DerivedSpec) -> np.ndarray:
    """The rows that the step graph makes of the codes that a derived matrix is made of."""
    name, first = next(
        (name, spec.codes_offset - at)
        for name, at, length in spans(step)
        if name.endswith("codes.blocks") and at <= spec.codes_offset < at + length
    )
    packed = read(folder, step[name], np.uint8)
    stem = name.removesuffix("codes.blocks")
    if spec.scheme == "int8":
        numbers = packed.astype(np.float32) - 128
        scales = read(folder, step[f"{stem}scales.by_block"], np.float32)
    else:
        numbers = np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:2], -1).astype(np.float32) - 8
        scales = read(folder, step[f"{stem}scales.by_group"], np.float32)
    first //= packed[0].size
    return (numbers * scales.reshape(*numbers.shape[:2], 1)).reshape(-1, spec.columns)[first : first + spec.rows]


def spans(tensors: dict[str, onnx.TensorProto]) -> list[tuple[str, int, int]]:
    """Name, offset and length of what lies in the data file."""
    places = [(name, {e.key: e.value for e in tensor.external_data}) for name, tensor in tensors.items()]
    return [(name, int(at["offset"]), int(at["length"])) for name, at in places if at.get("location") == DATA]


def test_both_graphs_read_one_file(optimized: Program, tmp_path: Path) -> None:
    """What the graph for many tokens adds is a scale for each row: no matrix twice."""
    _, graphs = built(optimized, tmp_path / "both", quantize="int4")
    program = run_passes_of(optimized, CompileConfig(quantize="int4"))
    (tmp_path / "step").mkdir()
    build_onnx(program, tmp_path / "step", ops="contrib", prefill=False)
    scales = 4 * sum(spec.rows for spec in graphs["prefill"].derived)
    assert stored(tmp_path / "both") == stored(tmp_path / "step") + scales
    assert sorted(p.name for p in (tmp_path / "step").iterdir()) == ["model.onnx", DATA]


def stored(folder: Path) -> int:
    """Bytes of the data file that some tensor covers."""
    covered = np.zeros((folder / DATA).stat().st_size, bool)
    for path in folder.glob("*.onnx"):
        for _, at, length in spans(initializers(path)):
            covered[at : at + length] = True
    return int(covered.sum())


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "w8a8"])
@pytest.mark.parametrize("ops", ["contrib", "standard"])
def test_what_is_written(optimized: Program, tmp_path: Path, ops: str, quantize: str | None) -> None:
    """The standard's own checker finds no fault in any graph, weights included, and two runs give the same bytes."""
    for name in ("one", "other"):
        _, graphs = built(optimized, tmp_path / name, ops=ops, quantize=quantize)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert set(files) == {graph.file for graph in graphs.values()} | {DATA}
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    for graph in graphs.values():
        path = tmp_path / "one" / graph.file
        if not graph.derived:
            onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        domains = {node.domain for node in model.graph.node}
        assert domains == ({"", "com.microsoft"} if ops == "contrib" else {""})
        assert_placed(initializers(path), graph)
    model = onnx.load(tmp_path / "one" / "model.onnx", load_external_data=False)
    load_external_data_for_model(model, str(tmp_path / "one"))
    bits = {None: 32, "int8": 8, "w8a8": 8, "int4": 6}[quantize]
    parameters = sum(w.numel for w in optimized.weights.values() if len(w.shape) == 2)
    assert stored(tmp_path / "one") < 1.6 * parameters * bits / 8


def assert_placed(tensors: dict[str, onnx.TensorProto], graph: GraphSpec) -> None:
    """The manifest tells of each weight of a graph with derived matrices where it is; they don't overlap."""
    places = {name: {e.key: e.value for e in t.external_data} for name, t in tensors.items() if t.external_data}
    derived = {name: int(at["offset"]) for name, at in places.items() if at["location"] != DATA}
    assert derived == {spec.name: spec.offset for spec in graph.derived}
    ends = [0, *(spec.offset + spec.rows * spec.columns for spec in graph.derived)]
    assert all(end <= spec.offset for end, spec in zip(ends, graph.derived, strict=False))
    assert {s.name for s in graph.stored} == (places.keys() - derived.keys() if derived else set())
    for spec in graph.stored:
        assert (spec.file, str(spec.offset)) == (places[spec.name]["location"], places[spec.name]["offset"])
        nbytes = np.dtype(spec.dtype).itemsize * math.prod(spec.shape)
        assert str(nbytes) == places[spec.name]["length"]


def test_what_the_checker_refuses(optimized: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(g: Any, x: Any, weight: Any, eps: float) -> str:
        return g.op("RMSNormalization", x, weight, axis="last", epsilon=eps)

    monkeypatch.setitem(build.TABLES, "contrib", {**build.TABLES["contrib"], "llmc.rms_norm": wrong})
    with pytest.raises(LlmcError) as caught:
        built(optimized, tmp_path)
    assert caught.value.code == "ONNX_INVALID" and "model.onnx" in caught.value.what


def test_caches_by_the_names_of_the_graph(optimized: Program) -> None:
    program = run_passes_of(optimized, CompileConfig())
    specs = cache_specs(program)
    assert [(s.key, s.present_value) for s in specs] == [
        (f"past_key_values.{i}.key", f"present.{i}.value") for i in (0, 1)
    ]
    assert {(s.kind, s.heads, s.key_dim, s.value_dim, s.length, s.dtype) for s in specs} == {
        ("static", 2, 16, 16, 128, "fp32")
    }


def test_each_weight_is_announced(optimized: Program, tmp_path: Path) -> None:
    seen: list[str] = []
    program = run_passes_of(optimized, CompileConfig())
    build_onnx(program, tmp_path, ops="contrib", prefill=False, watch=seen.append)
    assert set(seen) <= set(program.weights) and len(seen) > 8
