"""Compare the forecasts of `llmc plan`, which reads no weights, with those from the written graph."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner
from compiled import artifact, speaking_model

import llmc
from llmc.compiler.cli.main import main
from llmc.compiler.targets.tensorrt.forecast import forecast_build, summarize_weights
from llmc.compiler.targets.tensorrt.plan_tables import build_tables, forecasts
from llmc.ir.program import Program


@pytest.fixture(scope="module")
def program() -> Program:
    return llmc.capture(speaking_model(), dtype="fp16")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("not quantized", {}),
        ("int8", {"quantize": "int8"}),
        ("int4", {"quantize": "int4", "raise_share": 0.0}),
        ("w8a8", {"quantize": "w8a8"}),
        ("fp8", {"quantize": "fp8"}),
    ],
)
def test_forecasts_are_those_of_the_graph(program: Program, name: str, options: dict[str, Any]) -> None:
    folder = artifact("speaking", target="trt", engine=False, **options)
    weights = summarize_weights(folder / "model.onnx")
    expected, found = forecast_build(weights), forecasts(program)[name]
    assert found.data_bytes == pytest.approx(expected.data_bytes, rel=0.05)
    assert found.plan_bytes == pytest.approx(expected.plan_bytes, rel=0.05)
    assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.05)


def test_the_table_has_every_scheme(program: Program) -> None:
    (table,) = build_tables(program)
    assert [row[0] for row in table.rows] == ["not quantized", "int8", "int4", "w8a8", "fp8"]


def test_only_this_target_adds_a_table() -> None:
    def shown(target: str) -> str:
        result = CliRunner().invoke(main, ["plan", str(speaking_model()), "--target", target])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "Building an engine" in shown("trt") and "Building an engine" not in shown("ort")
