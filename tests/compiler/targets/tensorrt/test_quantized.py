"""Quantized linears and embeddings in TensorRT's spellings equal the ops' meaning, and have the types it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from calling import calling, check_call, random
from check_lowering import lowered
from onnx import TensorProto
from quantization_kinds import OUTPUTS, lookup, product, quantized_parts

from llmc.compiler.targets.tensorrt.ops import TENSORRT
from llmc.compiler.targets.tensorrt.quantized import reads_weights_apart
from llmc.kernels.ops import linear, quant_linear
from llmc.passes.queries import is_op

WIDTH = 96
CASES = [("int8", WIDTH), ("fp8", WIDTH), ("fp8", 0), *(("int4", group) for group in (96, 32, 16))]
CASES += [("int4 of a checkpoint", 32), ("int8 of a checkpoint", WIDTH)]
INPUTS = [("int8", "int8"), ("fp8", "fp8"), ("int8", "fp8")]


def parts_of(kind: str, group: int) -> dict[str, torch.Tensor]:
    return quantized_parts("int8" if kind == "int8 of a checkpoint" else kind, group, WIDTH)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "group"), CASES)
def test_quantized_weights(kind: str, group: int, bias: bool) -> None:
    parts, kind = parts_of(kind, group), kind.removesuffix(" of a checkpoint") if "int8" in kind else kind
    call = product(kind, group or WIDTH, bias=bias, parts=parts)
    check_call(call, TENSORRT, WIDTH, tolerance=1e-4, as_written=True, **parts, bias=random(OUTPUTS, seed=2))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("kind", "activation"), INPUTS)
def test_quantized_inputs(kind: str, activation: str, static: bool) -> None:
    """Input and weight are codes, so only the final float operations may differ."""
    parts = quantized_parts(kind, WIDTH, WIDTH)
    # Inputs range up to 3, so with this scale some of them saturate.
    x_scale = torch.tensor(2.2 / (127 if activation == "int8" else 448))
    call = product(kind, WIDTH, activation, bias=True, static=static, parts=parts)
    # A sum of 96 products, where one input in the middle between two codes may be rounded to the other.
    tolerance = {"int8": 1e-4, "fp8": 0.02}[activation]
    check_call(
        call, TENSORRT, WIDTH, tolerance=tolerance, as_written=True, **parts, bias=random(OUTPUTS, seed=2),
        x_scale=x_scale,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "group"), CASES[:-1])
def test_quantized_embeddings(kind: str, group: int) -> None:
    parts = quantized_parts(kind, group, WIDTH)
    check_call(lookup(kind, group or WIDTH, parts), TENSORRT, WIDTH, **parts)


@pytest.mark.parametrize(
    ("kind", "group", "element", "scales"),
    [
        ("int8", WIDTH, TensorProto.INT8, [OUTPUTS]),
        ("fp8", WIDTH, TensorProto.FLOAT8E4M3FN, [OUTPUTS]),
        ("int4", 32, TensorProto.INT4, [OUTPUTS, 3]),
    ],
)
def test_codes_are_stored_as_tensorrt_reads_them(
    kind: str, group: int, element: int, scales: list[int], tmp_path: Path
) -> None:
    parts = quantized_parts(kind, group, WIDTH)
    graph = lowered(calling(product(kind, group, parts=parts), WIDTH, **parts), TENSORRT, tmp_path).graph
    (dequantize,) = (node for node in graph.node if node.op_type == "DequantizeLinear")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    codes, steps = (stored[name] for name in dequantize.input)
    assert codes.data_type == element and list(codes.dims) == [OUTPUTS, WIDTH] and list(steps.dims) == scales
    assert len(dequantize.input) == 2, "there is no zero point"
    if kind == "int4":
        model = onnx.load(tmp_path / "model.onnx")
        (loaded,) = (t for t in model.graph.initializer if t.name == codes.name)
        values = onnx.numpy_helper.to_array(loaded).astype(int)
        low = parts["codes"].numpy() & 15
        assert np.array_equal(values[:, ::2], low.astype(int) - 8)


def test_linears_that_tensorrt_joins_itself() -> None:
    def kinds(kind: str, activation: str, widths: Sequence[int] = (8, 4, 4)) -> list[bool]:
        parts = quantized_parts(kind, WIDTH, WIDTH)
        program = calling(product(kind, WIDTH, activation, parts=parts), WIDTH, **parts)
        return [reads_weights_apart(node, widths) for node in program.nodes if is_op(node, quant_linear)]

    assert kinds("int8", "none") == kinds("int4", "none") == [False]
    assert kinds("int8", "none", [8, 8]) == kinds("int4", "none", [8, 8, 8]) == [False]
    assert kinds("int8", "none", [8, 8, 8]) == [True]
    assert kinds("int8", "int8") == kinds("fp8", "fp8") == kinds("fp8", "none") == [True]
    program = calling(lambda m, x, positions: linear(x, m.weight), WIDTH, weight=random(OUTPUTS, WIDTH))
    assert [reads_weights_apart(node, [8, 8]) for node in program.nodes if is_op(node, linear)] == [True]
