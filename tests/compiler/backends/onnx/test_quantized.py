"""Linears and embeddings over rounded weights: in both tables the op's own meaning, and no integer stored twice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from calling import SIZES, calling, check_call, random, run_in_onnx
from check_lowering import lowered
from check_pass import inputs
from torch import Tensor

from llmc.compiler.backends.onnx.contrib import CONTRIB
from llmc.compiler.backends.onnx.lower import Table
from llmc.compiler.backends.onnx.standard import STANDARD
from llmc.kernels.ops import quant_embedding, quant_linear
from llmc.kernels.ops.rounding import round_int4, round_int8

TABLES = {"standard": STANDARD, "contrib": CONTRIB}
INPUTS, OUTPUTS = 96, 40


def rounded(scheme: str, group: int, inputs: int = INPUTS) -> dict[str, Tensor]:
    """A weight whose groups differ in size and in the sign of what is farthest from zero."""
    w = random(OUTPUTS, inputs) * torch.linspace(0.2, 3, inputs)
    if scheme == "int8":
        codes, scales = round_int8(w)
        return {"codes": codes, "scales": scales}
    codes, scales, multiples = round_int4(w, group)
    assert (multiples < 0).any() and (multiples > 0).any()
    return {"codes": codes, "scales": scales, "multiples": multiples}


def product(scheme: str, group: int, activation: str, bias: bool = False) -> Any:
    def call(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return quant_linear(
            x, m.codes, m.scales, None, m.bias if bias else None, scheme, group, activation,
            multiples=m.multiples if scheme == "int4" else None,
        )  # fmt: skip

    return call


# int4 in groups that come out odd in number, even, and one alone.
KINDS = [("int8", INPUTS), ("int4", 32), ("int4", 16), ("int4", 96)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scheme", "group"), KINDS)
def test_rounded_weights_in_the_standard(scheme: str, group: int, bias: bool) -> None:
    weights = rounded(scheme, group) | {"bias": random(OUTPUTS, seed=2)}
    check_call(product(scheme, group, "none", bias), STANDARD, INPUTS, tolerance=1e-4, as_written=True, **weights)


# Codes of 4 bits meet integer kernels only as matrices that a runtime derives: see test_build.
EXACT = [(STANDARD, *kind) for kind in KINDS] + [(CONTRIB, "int8", INPUTS)]


@pytest.mark.parametrize(("table", "scheme", "group"), EXACT)
def test_rounded_inputs_are_exact_sums(scheme: str, group: int, table: Table) -> None:
    """Both sides are integers, so nothing but the last float operations may differ."""
    weights = rounded(scheme, group) | {"bias": random(OUTPUTS, seed=2)}
    call = product(scheme, group, "int8", True)
    check_call(call, table, INPUTS, tolerance=2e-5, as_written=table is STANDARD, **weights)


@pytest.mark.parametrize("table", TABLES)
def test_a_row_of_zeros_and_one_of_huge_numbers(table: str) -> None:
    def call(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        tilted = x * torch.where(positions % 3 == 0, 0.0, torch.where(positions % 3 == 1, 1e6, 1.0)).unsqueeze(-1)
        # Huge rows would hide the others in a comparison.
        return product("int8", INPUTS, "int8")(m, tilted, positions) / (tilted.abs().amax(-1, keepdim=True) + 1)

    check_call(call, TABLES[table], INPUTS, tolerance=2e-5, as_written=True, **rounded("int8", INPUTS))


# In ONNX Runtime the kernel rounds the input to int8 block by block: an error of 0.3% of its largest number each.
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scheme", "group", "inputs_"), [("int8", 96, 96), ("int4", 32, 96), ("int4", 128, 256)])
def test_rounded_weights_in_onnx_runtime(scheme: str, group: int, inputs_: int, bias: bool) -> None:
    weights = rounded(scheme, group, inputs_) | {"bias": random(OUTPUTS, seed=2) * 10}
    program = calling(product(scheme, group, "none", bias), inputs_, **weights)
    run = run_in_onnx(program, CONTRIB)
    for size in SIZES:
        got, want = run(*inputs(*size)), program(*inputs(*size))
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < 0.01, error


@pytest.mark.parametrize("table", TABLES)
def test_a_rounded_table(table: str) -> None:
    def rows(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return quant_embedding(positions + 3, m.codes, m.scales, None, "int8", INPUTS)

    check_call(rows, TABLES[table], INPUTS, **rounded("int8", INPUTS))


@pytest.mark.parametrize("table", TABLES)
def test_codes_lie_in_the_file_once(table: str, tmp_path: Path) -> None:
    """The head and the embedding of a model read one matrix."""

    def tied(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        x = quant_embedding(positions, m.codes, m.scales, None, "int8", INPUTS)
        return product("int8", INPUTS, "none")(m, x, positions)

    program = calling(tied, INPUTS, **rounded("int8", INPUTS))
    model = lowered(program, TABLES[table], tmp_path)
    places = {{e.key: e.value for e in t.external_data}["offset"] for t in integers(model)}
    assert len(places) == 1 and (tmp_path / "data").stat().st_size < 4 * 4096


def integers(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.UINT4)
    return [t for t in model.graph.initializer if t.data_type in kinds and t.external_data]


def test_4_bits_take_4_bits(tmp_path: Path) -> None:
    for table in TABLES.values():
        lowered(calling(product("int4", 32, "none"), INPUTS, **rounded("int4", 32)), table, tmp_path)
        names = {t.name for t in integers(onnx.load(tmp_path / "model.onnx", load_external_data=False))}
        assert not any("columns" in name for name in names)
        codes = [t for t in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
                 if "blocks" in t.name or "uint4" in t.name]  # fmt: skip
        assert {e.value for t in codes for e in t.external_data if e.key == "length"} == {str(OUTPUTS * INPUTS // 2)}


@pytest.mark.parametrize("name", ["zeros", "x_scale"])
def test_what_no_pass_makes_is_refused(name: str) -> None:
    given: dict[str, Any] = {"zeros": None, "x_scale": None, name: SimpleNamespace()}
    for table in TABLES.values():
        with pytest.raises(AssertionError, match="yet"):
            refuse(table, given)


def refuse(table: Table, given: dict[str, Any]) -> None:
    table["llmc.quant_linear"](None, None, None, None, given["zeros"], None, "int8", 96, "none", given["x_scale"], None)


def test_the_rounding_of_a_shared_input_is_made_once(tmp_path: Path) -> None:
    def two(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return product("int8", INPUTS, "int8")(m, x, positions) + product("int8", INPUTS, "int8")(m, x, positions)

    model = lowered(calling(two, INPUTS, **rounded("int8", INPUTS)), CONTRIB, tmp_path)
    made = [node.op_type for node in model.graph.node]
    assert (made.count("QuantizeLinear"), made.count("MatMulIntegerToFloat")) == (1, 2)
