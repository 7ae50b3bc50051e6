"""The files of an artifact: two graphs over the same numbers, held to the standard, the same bytes each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from finishing import prefill_passes, step_passes
from onnx.external_data_helper import load_external_data_for_model
from schemes import scheme as make_scheme
from zoo.tiny import tiny_model

import llmc
from llmc import LlmcError, Program, Stage
from llmc.compiler.describe import cache_spec
from llmc.compiler.targets.base import Lowered
from llmc.compiler.targets.onnx.external import LINE
from llmc.compiler.targets.ort import write
from llmc.compiler.targets.ort.facts import HEAD_MULTIPLE, PREFILL_TOKENS
from llmc.compiler.targets.ort.target import TARGET
from llmc.compiler.targets.ort.write import DATA, write_graphs
from llmc.compiler.targets.registry import make_config
from llmc.kernels.ops.quantized import decode
from llmc.passes.base import Pass
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.pipeline import caching_passes
from llmc.passes.quantize.quantization_plan import analyse
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.schemes import Grid, Override
from llmc.passes.runner import Runner
from llmc.runtimes.artifact.manifest import Phase
from llmc.runtimes.engines.onnx_names import PIECE, past_name, piece_name, present_name
from llmc.runtimes.engines.ort.derive import derive
from llmc.runtimes.engines.ort.device import Cpu
from llmc.runtimes.engines.ort.section import DerivedSpec, GraphFile
from llmc.runtimes.engines.ort.session import open_session


@pytest.fixture(scope="module")
def optimized() -> Program:
    return llmc.capture(tiny_model("llama"), until=Stage.OPTIMIZED)


def built(optimized: Program, folder: Path, **options: Any) -> Lowered:
    """The files of an artifact with these options."""
    folder.mkdir(exist_ok=True)
    return TARGET.lower(graphs_of(optimized, **options), folder, make_config(**options), lambda name: None)


def graphs_of(optimized: Program, **options: Any) -> dict[str, Program]:
    config = make_config(**options)
    scheme = TARGET.scheme(config)
    plan = None if scheme is None else analyse(optimized, scheme)
    program = passed(optimized, [*([Quantize(plan)] if plan else []), *caching_passes(cache_codes=config.cache_codes)])
    return {name: passed(program, passes) for name, passes in TARGET.finishing_passes(config, plan, ()).items()}


def passed(program: Program, passes: Sequence[Pass]) -> Program:
    return Runner().run(program.copy(), passes)


# What integer kernels take as it is, or in other groups than the step graph.
INTEGERS = {
    "int8": Grid("int8"),
    "int4": Grid("int4", 16),
    "int4 with zeros": Grid("int4", 16, symmetric=False),
}


def built_of(
    optimized: Program, folder: Path, grid: Grid, overrides: Sequence[Override] = ()
) -> tuple[Program, Lowered]:
    """The files of two graphs, and the program of the prefill graph."""
    plan = analyse(optimized, make_scheme("one", grid), overrides)
    program = passed(optimized, [Quantize(plan), *caching_passes(), FuseAttention(HEAD_MULTIPLE)])
    many = passed(program, prefill_passes())
    return many, write_graphs({"step": passed(program, step_passes()), "prefill": many}, folder, "contrib")


@pytest.mark.parametrize("name", INTEGERS)
def test_the_graphs_hold_the_same_integers(optimized: Program, tmp_path: Path, name: str) -> None:
    scheme = INTEGERS[name].scheme
    many, lowered = built_of(optimized, tmp_path, INTEGERS[name])
    graphs = lowered.section.graphs
    assert {name: graph.file for name, graph in graphs.items()} == {"step": "model.onnx", "prefill": "prefill.onnx"}
    assert lowered.phases == {"step": Phase(1, PREFILL_TOKENS - 1), "prefill": Phase(PREFILL_TOKENS)}
    step = initializers(tmp_path / "model.onnx")
    assert len(graphs["prefill"].derived) == 10  # qkv, o, gate, up, down, in two layers
    negative = False
    for spec in graphs["prefill"].derived:
        codes = spec.name.removesuffix(".columns")
        before, _, after = codes.rpartition("codes")
        parts = [f"{before}{part}{after}" for part in ("codes", "scales", "zeros", "multiples")]
        packed, scales, zeros, multiples = (many.weights[n].evaluate() if n in many.weights else None for n in parts)
        assert packed is not None and scales is not None
        whole = decode(packed, zeros, scheme, spec.group_size, torch.float64, multiples).flatten(1)
        matrix = derive(tmp_path, spec)
        assert matrix.dtype == np.int8 and matrix.flags.c_contiguous
        assert np.array_equal(matrix, whole.T.numpy())
        # What the step graph's kernel makes of codes and scales is the same weight, up to a scale's last digit.
        used = step_weight(tmp_path, step, spec)
        torch.testing.assert_close(torch.from_numpy(used), whole.float() * scales, rtol=1e-6, atol=0)
        negative |= multiples is not None and bool((multiples < 0).any())
    assert negative == (name == "int4")


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
    """Return the output channels that the step graph computes from the codes of a derived matrix."""
    name, first = next(
        (name, spec.codes_offset - at)
        for name, at, length in spans(step)
        if "codes.unsigned" in name and at <= spec.codes_offset < at + length
    )
    packed = read(folder, step[name], np.uint8)
    stem, _, _ = name.partition("codes.unsigned")
    scales = read(folder, step[f"{stem}scales"], np.float32)
    if spec.scheme == "int8":
        numbers = (packed.astype(np.float32) - 128).reshape(*packed.shape[:1], -1) * scales
    else:
        codes = np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:2], -1).astype(np.float32)
        zeros = np.full((*packed.shape[:2], 1), 8.0, np.float32)
        if f"{stem}zeros.unsigned" in step:
            pairs = read(folder, step[f"{stem}zeros.unsigned"], np.uint8)
            zeros = np.stack((pairs & 15, pairs >> 4), -1).reshape(len(pairs), -1)[:, : packed.shape[1], None]
        steps = scales * read(folder, step[f"{stem}multiples"], np.int8)
        numbers = (codes - zeros) * steps[:, :, None]
    first //= packed[0].size
    return numbers.reshape(-1, spec.columns)[first : first + spec.rows]


def spans(tensors: dict[str, onnx.TensorProto]) -> list[tuple[str, int, int]]:
    """Name, offset and length of what lies in the data file."""
    places = [(name, {e.key: e.value for e in tensor.external_data}) for name, tensor in tensors.items()]
    return [(name, int(at["offset"]), int(at["length"])) for name, at in places if at.get("location") == DATA]


# Each part of the model on a grid of its own.
MIXED = [
    Override("*.qkv_proj.*", Grid("fp8", activation="fp8")),
    Override("*.o_proj.*", Grid("int4", 16, symmetric=False, activation="int8")),
    Override("*.down_proj.*", Grid("int8", activation="int8")),
]


@pytest.mark.parametrize("name", [*INTEGERS, "fp8", "mixed"])
def test_the_graph_of_many_tokens_computes_what_its_program_does(optimized: Program, tmp_path: Path, name: str) -> None:
    """Integers on both sides but for the head, whose kernel rounds its input to int8 block by block."""
    grids = {**INTEGERS, "fp8": Grid("fp8", activation="fp8"), "mixed": Grid("int4", 16)}
    many, lowered = built_of(optimized, tmp_path, grids[name], MIXED if name == "mixed" else [])
    graphs = lowered.section.graphs
    assert bool(graphs["prefill"].derived) == (name != "fp8")
    assert name != "mixed" or {spec.scheme for spec in graphs["prefill"].derived} == {"int8", "int4"}
    assert name != "mixed" or "float8_e4m3fn" in {spec.dtype for spec in graphs["prefill"].stored}
    tokens = np.random.default_rng(0).integers(3, 72, (1, PREFILL_TOKENS))
    session, held = open_session(tmp_path, graphs["prefill"], Cpu(1))
    caches = {
        past_name(i, part.role): np.zeros((1, cache.heads, 0, part.width), np.float32)
        for i, cache in enumerate(many.caches) for part in cache.tensors
    }  # fmt: skip
    caches |= {piece_name(name): cache for name, cache in caches.items()}
    wanted = np.arange(PREFILL_TOKENS)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "rows": wanted, **caches}
    feeds[PIECE] = np.zeros(0, np.int64)
    got = session.run(["logits"], feeds)[0][0]
    given = {"tokens": torch.from_numpy(tokens), "starts": torch.zeros(1, dtype=torch.int64)}
    arguments = many.arguments(given | {"wanted": torch.from_numpy(wanted)}, many.empty_caches(1))
    want = many.run(*arguments)[0][0].detach().numpy()
    assert np.sqrt(np.square(got - want).mean() / np.square(want).mean()) < 0.02
    del session, held


def test_both_graphs_read_one_file(optimized: Program, tmp_path: Path) -> None:
    """The graph for many tokens adds nothing: no matrix twice, and no scale."""
    lowered = built(optimized, tmp_path / "both", quantize="int4")
    (tmp_path / "step").mkdir()
    write_graphs({"step": graphs_of(optimized, quantize="int4")["step"]}, tmp_path / "step", "contrib")
    assert len(lowered.section.graphs["prefill"].derived) == 10
    assert stored(tmp_path / "both") == stored(tmp_path / "step")
    assert sorted(p.name for p in (tmp_path / "step").iterdir()) == ["model.onnx", DATA]


def stored(folder: Path) -> int:
    """Bytes of the data file that some tensor covers."""
    covered = np.zeros((folder / DATA).stat().st_size, bool)
    for path in folder.glob("*.onnx"):
        for _, at, length in spans(initializers(path)):
            covered[at : at + length] = True
    return int(covered.sum())


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "w8a8", "fp8", "nf4"])
@pytest.mark.parametrize("ops", ["contrib", "standard"])
def test_what_is_written(optimized: Program, tmp_path: Path, ops: str, quantize: str | None) -> None:
    """The standard's own checker finds no fault in any graph, weights included, and two runs give the same bytes."""
    for name in ("one", "other"):
        lowered = built(optimized, tmp_path / name, ops=ops, quantize=quantize)
    graphs = lowered.section.graphs
    assert lowered.phases.keys() == graphs.keys() and lowered.requires == {"onnxruntime": ">=1.30,<2"}
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
    bits = {None: 32, "int8": 8.5, "w8a8": 8, "int4": 6, "fp8": 8, "nf4": 6}[quantize]
    parameters = sum(w.numel for w in optimized.weights.values() if len(w.shape) == 2)
    assert stored(tmp_path / "one") < 1.6 * parameters * bits / 8


def assert_placed(tensors: dict[str, onnx.TensorProto], graph: GraphFile) -> None:
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

    monkeypatch.setitem(write.TABLES, "contrib", {**write.TABLES["contrib"], "llmc.rms_norm": wrong})
    with pytest.raises(LlmcError) as caught:
        built(optimized, tmp_path)
    assert caught.value.code == "ONNX_INVALID" and "model.onnx" in caught.value.what


@pytest.mark.parametrize("codes", ["auto", "int8", "fp8"])
def test_caches_by_the_names_of_the_graph(optimized: Program, tmp_path: Path, codes: str) -> None:
    (program,) = graphs_of(optimized, kv_cache_dtype=codes).values()
    specs = [cache_spec(cache) for cache in program.caches]
    assert {(s.kind, s.heads, s.key_dim, s.value_dim, s.length, s.dtype) for s in specs} == {
        ("static", 2, 16, 16, 128, "fp32" if codes == "auto" else codes)
    }
    write_graphs({"step": program}, tmp_path, "contrib")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    parts = [(i, part.role) for i, spec in enumerate(specs) for part in spec.parts]
    inputs = [i.name for i in graph.input if i.name.startswith("past")]
    assert inputs == [past_name(i, role) for i, role in parts]
    assert [o.name for o in graph.output if o.name.startswith("present")] == [present_name(i, r) for i, r in parts]
    numbers = ["past_key_values.0.key", "past_key_values.0.value"]
    scales = ["past_key_values.0.key_scale", "past_key_values.0.value_scale"] if codes != "auto" else []
    assert inputs[: len(inputs) // 2] == [*numbers, *scales]


def test_each_weight_is_announced(optimized: Program, tmp_path: Path) -> None:
    seen: list[str] = []
    (program,) = graphs_of(optimized).values()
    write_graphs({"step": program}, tmp_path, "contrib", seen.append)
    assert set(seen) <= set(program.weights) and len(seen) > 8
