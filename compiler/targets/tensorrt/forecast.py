"""Forecast what a build needs, from the sizes of the weights in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from ....runtimes.engines.tensorrt.section import TensorRtSection

_DTYPES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
_QUANTIZED = ("int8", "int4", "fp8")
_PASSED_ON = ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity")


@dataclass(frozen=True)
class WeightSummary:
    """The weights of a graph.

    Attributes:
        bytes_by_dtype: stored bytes, by the weights' dtype.
        copied_bytes: quantized weights that are both looked up and multiplied with. The engine stores them twice,
            because it transposes the ones that it multiplies with.
        matmuls: multiplications with a constant weight.
        nodes: all nodes of the graph.
    """

    bytes_by_dtype: dict[str, int]
    copied_bytes: int
    matmuls: int
    nodes: int

    @property
    def data_bytes(self) -> int:
        """All stored bytes."""
        return sum(self.bytes_by_dtype.values())


@dataclass(frozen=True)
class Forecast:
    """What a build needs.

    Attributes:
        data_bytes: weights in the graph's data.
        weight_bytes: weights in the engine.
        peak_bytes: memory of the building process at its peak.
    """

    data_bytes: int
    weight_bytes: int
    plan_bytes: int
    peak_bytes: int


def summarize_weights(path: Path) -> WeightSummary:
    """Return the sizes of the weights in an ONNX file, without reading them."""
    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {tensor.name: _stored_bytes(tensor) for tensor in graph.initializer}
    dtypes = {tensor.name: _DTYPES.get(tensor.data_type, "other") for tensor in graph.initializer}
    by_dtype: dict[str, int] = {}
    for name, size in sizes.items():
        by_dtype[dtypes[name]] = by_dtype.get(dtypes[name], 0) + size
    makers = {output: node for node in graph.node for output in node.output}
    multiplied = [_stored(node.input[1], makers) for node in graph.node if node.op_type == "MatMul"]
    looked_up = {_stored(node.input[0], makers) for node in graph.node if node.op_type == "Gather"}
    copied = {name for name in multiplied if name in looked_up and dtypes.get(name) in _QUANTIZED}
    matmuls = sum(name in sizes for name in multiplied)
    return WeightSummary(by_dtype, sum(sizes[name] for name in copied), matmuls, len(graph.node))


def _stored_bytes(tensor: TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    bits: dict[int, int] = {TensorProto.INT4: 4, TensorProto.INT64: 64, TensorProto.FLOAT: 32, TensorProto.INT32: 32}
    count = 1
    for size in tensor.dims:
        count *= size
    return len(tensor.raw_data) or count * bits.get(tensor.data_type, 16) // 8


def _stored(name: str, makers: dict[str, NodeProto]) -> str:
    """Return the name of the tensor that a weight is made from."""
    while name in makers and makers[name].op_type in _PASSED_ON:
        name = makers[name].input[0]
    return name


def forecast_build(weights: WeightSummary, section: TensorRtSection) -> Forecast:
    """Forecast a build."""
    weight_bytes = weights.data_bytes + weights.copied_bytes
    code = len(section.profiles) * weights.matmuls * 100_000
    return Forecast(weights.data_bytes, weight_bytes, weight_bytes + code, 4 * weight_bytes + 400_000_000)
