"""Tests of the forecast: measured builds of decoders with random weights, and the summary of a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorrt_decoders import Decoder, write_decoder

from llmc.compiler.targets.tensorrt.forecast import MatMulWeight, WeightSummary, forecast_build, summarize_weights

SHAPES = {
    "demo": Decoder(576, 30, 9, 3, 64, 1536, 49152),
    "1.1B": Decoder(2048, 22, 32, 4, 64, 5632, 32000, tied=False),
    "0.6B": Decoder(1024, 28, 16, 8, 128, 3072, 151936),
    "wide": Decoder(1536, 12, 12, 2, 128, 8960, 64000, tied=False),
    "0.5B": Decoder(896, 24, 14, 2, 64, 4864, 151936),
    "3B, 5 layers": Decoder(3072, 5, 24, 8, 128, 8192, 32000, tied=False),
}
# Shape, precision, group size, and the measured MB of the plan and of the process at its peak.
MEASURED = [
    ("demo", "bf16", 0, 291.5, 1333),
    ("demo", "int8", 0, 176.0, 1173),
    ("demo", "int4", 64, 125.9, 1061),
    ("demo", "fp8", 0, 183.4, 1285),
    ("demo", "w8a8", 0, 183.5, 1226),
    ("1.1B", "bf16", 0, 2213.9, 6167),
    ("1.1B", "int8", 0, 1127.7, 4204),
    ("1.1B", "int4", 64, 673.5, 3520),
    ("1.1B", "fp8", 0, 1133.3, 4072),
    ("0.6B", "bf16", 0, 1214.1, 4139),
    ("0.6B", "int4", 64, 429.7, 2013),
    ("wide", "int4", 128, 505.3, 2218),
    ("wide", "w8a8", 0, 783.0, 2471),
]
# The numbers were not fitted to these.
HELD_OUT = [
    ("0.5B", "bf16", 0, 1006.6, 3032),
    ("0.5B", "int8", 0, 528.5, 2376),
    ("3B, 5 layers", "bf16", 0, 1405.9, 3806),
    ("3B, 5 layers", "int4", 64, 473.4, 2320),
]
TOLERANCE = 0.15


def summary(shape: Decoder, precision: str, group: int) -> WeightSummary:
    """Summarize the weights that a decoder would have, without writing them."""
    quantized = precision != "bf16"
    weight_only = precision in ("int8", "int4")
    bits = {"bf16": 16, "int4": 4}.get(precision, 8)
    queries, cached = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [(shape.hidden, queries + 2 * cached), (queries, shape.hidden), (shape.hidden, 2 * shape.ffn)]
    if not weight_only:
        sizes = [(shape.hidden, queries), *[(shape.hidden, cached)] * 2, sizes[1], *[(shape.hidden, shape.ffn)] * 2]
    sizes.append((shape.ffn, shape.hidden))
    dtype = {"w8a8": "int8"}.get(precision, precision)
    linears = [
        MatMulWeight(i * o * bits // 8, dtype, True, quantized and not weight_only) for i, o in sizes
    ] * shape.layers
    scales = sum(i * o // group if group else o for i, o in sizes) * 2 * shape.layers if quantized else 0
    wide = shape.vocab * shape.hidden * (1 if quantized else 2)
    head = MatMulWeight(wide, "int8" if quantized else "bf16", True, False)
    stored = sum(one.nbytes for one in linears) + scales + wide * (1 if shape.tied else 2)
    return WeightSummary({"all": stored}, (*linears, head))


@pytest.mark.parametrize(("shape", "precision", "group", "plan", "peak"), [*MEASURED, *HELD_OUT])
def test_forecast_is_near_what_was_measured(shape: str, precision: str, group: int, plan: float, peak: float) -> None:
    forecast = forecast_build(summary(SHAPES[shape], precision, group))
    assert forecast.plan_bytes / 1e6 == pytest.approx(plan, rel=TOLERANCE)
    assert forecast.peak_bytes / 1e6 == pytest.approx(peak, rel=TOLERANCE)


def test_summary_of_a_graph(tmp_path: Path) -> None:
    decoder = Decoder(layers=1, scheme="w8a8", wide="int8")
    weights = summarize_weights(write_decoder(decoder, tmp_path))
    linears = [one for one in weights.matmuls if one.has_quantized_input]
    assert len(linears) == 7 and len(weights.matmuls) == 8
    assert sum(one.nbytes for one in linears) == 128 * (256 + 2 * 128 + 256 + 3 * 256)
    head = weights.matmuls[-1]
    assert (head.nbytes, head.dtype, head.is_transposed) == (512 * 128, "int8", True)
    assert weights.bytes_by_dtype["int8"] == sum(one.nbytes for one in weights.matmuls)
    data = (tmp_path / "model.onnx.data").stat().st_size
    assert weights.bytes_by_dtype["int8"] <= data


def test_summary_of_4_bit_weights(tmp_path: Path) -> None:
    decoder = Decoder(layers=1, scheme="int4", untransposed=True)
    weights = summarize_weights(write_decoder(decoder, tmp_path))
    assert {one.dtype for one in weights.matmuls[:-1]} == {"int4"}
    assert not any(one.is_transposed for one in weights.matmuls)
    assert weights.bytes_by_dtype["int4"] == 128 * (256 + 2 * 128 + 256 + 3 * 256) // 2
