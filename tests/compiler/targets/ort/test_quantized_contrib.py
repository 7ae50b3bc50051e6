"""The kernels of ONNX Runtime for each scheme; no value is stored twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from calling import calling, random
from check_lowering import lowered
from check_pass import inputs
from quantization_kinds import OUTPUTS, lookup, product, quantized_parts
from torch import Tensor

from llmc.compiler.targets.onnx.check import check_onnx
from llmc.compiler.targets.onnx.rounded import rounded_model
from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.compiler.targets.ort.contrib import CONTRIB
from llmc.ir.program import Program

TABLES = {"standard": STANDARD, "contrib": CONTRIB}


def kernels(model: onnx.ModelProto) -> list[tuple[str, int | None]]:
    """Return the types and block sizes of the nodes that read codes."""
    result = []
    for node in model.graph.node:
        blocks = [a.i for a in node.attribute if a.name == "block_size"]
        if node.domain or blocks or node.op_type == "DequantizeLinear":
            result.append((node.op_type, *(blocks or [None])))
    return result


KERNELS: list[tuple[str, int, int, str, tuple[str, int | None]]] = [
    ("int8", 64, 256, "none", ("MatMulNBits", 64)),
    ("int8", 256, 512, "none", ("MatMulNBits", 256)),
    ("int8", 256, 256, "none", ("MatMulNBits", 128)),  # one scale per output channel: the fastest block
    ("int8", 48, 96, "none", ("MatMulNBits", 16)),
    ("int8 with zeros", 32, 96, "none", ("MatMulNBits", 32)),
    ("int8", 24, 96, "none", ("DequantizeLinear", 24)),
    ("int4", 256, 512, "none", ("MatMulNBits", 256)),
    ("int4 with zeros", 16, 96, "none", ("MatMulNBits", 16)),
    ("int4 of a checkpoint", 96, 96, "none", ("MatMulNBits", 32)),
    ("nf4", 64, 128, "none", ("MatMulBnb4", 64)),
    ("nf4", 48, 96, "none", ("MatMulBnb4", 16)),
    ("fp8", 96, 96, "none", ("DequantizeLinear", None)),
    ("fp8", 128, 256, "none", ("DequantizeLinear", 128)),
    ("int8", 96, 96, "int8", ("MatMulIntegerToFloat", None)),
    ("int8", 32, 96, "int8", ("DequantizeLinear", 32)),  # not an int8 matrix times one scale per output channel
    ("fp8", 96, 96, "fp8", ("DequantizeLinear", None)),
]


@pytest.mark.parametrize(("kind", "group", "width", "activation", "kernel"), KERNELS)
def test_the_kernel_of_a_linear(
    tmp_path: Path, kind: str, group: int, width: int, activation: str, kernel: tuple[str, int | None]
) -> None:
    parts = quantized_parts(kind, group, width)
    model = lowered(calling(product(kind, group, activation, parts=parts), width, **parts), CONTRIB, tmp_path)
    assert kernels(model) == [kernel]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_of_an_embedding(tmp_path: Path, bits: int) -> None:
    for group, kernel in ((32, ("GatherBlockQuantized", 32)), (24, None)):
        parts = quantized_parts(f"int{bits}", group, 96)
        model = lowered(calling(lookup(f"int{bits}", group, parts), 96, **parts), CONTRIB, tmp_path)
        assert kernels(model) == ([kernel] if kernel else [])


def locations(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Return the offset and length of each weight in the data file."""
    external = {t.name: {e.key: int(e.value) for e in t.external_data if e.key != "location"}
                for t in model.graph.initializer if t.external_data}  # fmt: skip
    return {name: (entry["offset"], entry["length"]) for name, entry in external.items()}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", ["int8", "int8 with zeros", "int4", "int4 with zeros"])
def test_a_tied_lm_head_and_embedding_share_their_codes(kind: str, table: str, tmp_path: Path) -> None:
    parts = quantized_parts(kind, 32, 96)

    def tied(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return product(kind, 32, parts=parts)(m, lookup(kind, 32, parts)(m, x, positions), positions)

    model = lowered(calling(tied, 96, **parts), TABLES[table], tmp_path)
    nbytes = parts["codes"].numel()
    assert len({offset for offset, length in locations(model).values() if length == nbytes}) == 1
    names = [node.op_type for node in model.graph.node]
    assert names.count("Mul") <= 1 + 1 * (table == "standard"), "the scales of the groups are computed more than once"


# Bytes per output channel besides the codes, for 3 groups of 32: scales or multiples, and zero points.
EXTRA_BYTES = {"int8": 12, "int8 with zeros": 15, "int4": 4 + 3, "int4 with zeros": 4 + 3 + 2, "nf4": 12}


@pytest.mark.parametrize("kind", EXTRA_BYTES)
def test_the_stored_bytes(kind: str, tmp_path: Path) -> None:
    parts = quantized_parts(kind, 32, 96)
    model = lowered(calling(product(kind, 32, parts=parts), 96, **parts), CONTRIB, tmp_path)
    stored = {location for name, location in locations(model).items() if "table" not in name}
    assert sum(length for _, length in stored) == parts["codes"].numel() + OUTPUTS * EXTRA_BYTES[kind]


def test_scales_per_output_channel_are_stored_once_for_all_kernels(tmp_path: Path) -> None:
    parts = quantized_parts("int8", 96, 96)

    def both(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return product("int8", 96, parts=parts)(m, x, positions) + product("int8", 96, "int8", parts=parts)(
            m, x, positions
        )

    model = lowered(calling(both, 96, **parts), CONTRIB, tmp_path)
    assert len({offset for offset, length in locations(model).values() if length == 4 * OUTPUTS}) == 1


def optimized(folder: Path) -> onnx.ModelProto:
    """Return the model in a folder after ONNX Runtime's graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


@pytest.mark.parametrize("kind", ["int8", "int8 with zeros", "int4", "int4 with zeros", "nf4"])
@pytest.mark.parametrize("group", [32, 96])
def test_scales_are_computed_when_a_graph_is_opened(kind: str, group: int, tmp_path: Path) -> None:
    """Kernels pack weights with their scales in advance if those are constants."""
    parts = quantized_parts(kind, group, 96)
    lowered(calling(product(kind, group, parts=parts), 96, **parts), CONTRIB, tmp_path)
    model = optimized(tmp_path)
    (kernel,) = [node for node in model.graph.node if node.op_type in ("MatMulNBits", "MatMulBnb4")]
    constants = {tensor.name for tensor in model.graph.initializer}
    assert {name for name in kernel.input[1:] if name} <= constants


@pytest.mark.parametrize("kind", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("group", [256, 128])
def test_float8_codes_are_not_expanded_in_memory(kind: str, group: int, tmp_path: Path) -> None:
    parts = quantized_parts(kind, group, 256)
    lowered(calling(product(kind, group, parts=parts), 256, **parts), CONTRIB, tmp_path)
    large = [t.data_type for t in optimized(tmp_path).graph.initializer if list(t.dims) == [OUTPUTS, 256]
             or list(t.dims) == [256, OUTPUTS]]  # fmt: skip
    assert large == [onnx.TensorProto.FLOAT8E4M3FN if kind == "fp8" else onnx.TensorProto.FLOAT8E5M2]


@pytest.mark.parametrize("activation", ["int8", "fp8"])
@pytest.mark.parametrize("static", [False, True])
def test_a_shared_input_is_quantized_once(tmp_path: Path, activation: str, static: bool) -> None:
    kind = "int8" if activation == "int8" else "fp8"
    parts = quantized_parts(kind, 96, 96)
    call = product(kind, 96, activation, static=static, parts=parts)

    def two(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return call(m, x, positions) + call(m, x, positions)

    for table in TABLES.values():
        model = lowered(calling(two, 96, **parts, x_scale=torch.tensor(0.02)), table, tmp_path)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds["QuantizeLinear"] + kinds["Clip"] == 1 and kinds["ReduceMax"] == (0 if static else 1)
        assert kinds["MatMulIntegerToFloat"] + kinds["MatMul"] == 2


def test_an_input_is_quantized_once_per_static_scale(tmp_path: Path) -> None:
    parts = quantized_parts("int8", 96, 96)

    def two(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        first = product("int8", 96, "int8", static=True, parts=parts)(m, x, positions)
        m = type("Other", (), {"codes": m.codes, "scales": m.scales, "x_scale": m.other})
        return first + product("int8", 96, "int8", static=True, parts=parts)(m, x, positions)

    tensors = {**parts, "x_scale": torch.tensor(0.02), "other": torch.tensor(0.03)}
    model = lowered(calling(two, 96, **tensors), CONTRIB, tmp_path)
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 2


def test_a_bias_is_fused_into_kernels_that_support_one(tmp_path: Path) -> None:
    parts = quantized_parts("int4", 32, 96)
    call = product("int4", 32, bias=True, parts=parts)
    model = lowered(calling(call, 96, **parts, bias=random(OUTPUTS)), CONTRIB, tmp_path)
    assert "Add" not in {node.op_type for node in model.graph.node}


HALVES = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kind", "group", "width", "activation", "kernel"), KERNELS)
def test_the_kernel_of_a_linear_in_half_precision(
    tmp_path: Path,
    kind: str,
    group: int,
    width: int,
    activation: str,
    kernel: tuple[str, int | None],
    dtype: torch.dtype,
) -> None:
    """Those that multiply by codes keep to it; all others compute in float32."""
    parts = quantized_parts(kind, group, width)
    multiply = product(kind, group, activation, parts=parts)
    program = calling(lambda m, x, positions: multiply(m, x.to(dtype), positions).float(), width, **parts)
    model = lowered(program, CONTRIB, tmp_path)
    found = kernel if kernel[0] != "MatMulIntegerToFloat" else ("DequantizeLinear", None)
    assert kernels(model) == [found]
    check_rounded(program, model, tmp_path, HALVES[dtype] if activation == "none" else 2e-2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group", [32, 24])
def test_an_embedding_in_half_precision(tmp_path: Path, group: int, dtype: torch.dtype) -> None:
    parts = quantized_parts("int8", group, 96)
    parts["scales"] = parts["scales"].to(dtype)
    find = lookup("int8", group, parts)
    program = calling(lambda m, x, positions: find(m, x, positions).float(), 96, **parts)
    check_rounded(program, lowered(program, CONTRIB, tmp_path), tmp_path, HALVES[dtype])


def check_rounded(program: Program, model: onnx.ModelProto, folder: Path, tolerance: float) -> None:
    """Compare a graph that computes in half precision with its program."""
    check_onnx(folder / "model.onnx")  # the rounded graph has one type of floats, and mixes none
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(rounded_model(model).SerializeToString(), options)
    for size in ((1, 1), (3, 16)):
        tokens, positions = inputs(*size)
        given = {"input_0": tokens.numpy(), "input_1": positions.numpy()}
        (got,) = session.run(None, {i.name: given[i.name] for i in session.get_inputs()})
        want = program(tokens, positions)
        error = (torch.from_numpy(got) - want).square().mean() / want.square().mean()
        assert error.sqrt() < tolerance
