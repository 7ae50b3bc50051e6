"""Forecast what a build needs, from the sizes of the weights in the graph.

The numbers were fitted to builds of decoders of 0.1 to 1.1 billion parameters in all precisions. Each term has a cause:

- plan: the weights, and the code of the kernels. TensorRT compiles a kernel for each multiplication with weights only
  quantized. The others come out of a library, and only the kernels between them are compiled.
- peak memory: the process itself, the compiler's work on each kernel, the mapped data file, the engine's weights before
  they are written, and the copies of weights that the compiler has rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto

_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
_ITEM_BITS: dict[int, int] = {TensorProto.INT64: 64, TensorProto.FLOAT: 32, TensorProto.INT32: 32, TensorProto.INT4: 4}
_QUANTIZED = ("int8", "int4", "fp8")
_PASSED_ON = ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity")

# Bytes of compiled code: in all, and for each multiplication.
_CODE = 2_500_000
_CODE_16_BITS, _CODE_QUANTIZED_INPUT, _CODE_WEIGHT_ONLY = 95_000, 210_000, 310_000
_PROCESS = 330_000_000
_COMPILING = 11  # times the code
# Copies of a weight that the compiler rewrites. 16-bit ones with the same input are joined, others are transposed; for
# that, 4-bit ones are unpacked.
_COPIES_16_BITS, _COPIES_QUANTIZED, _COPIES_UNPACKED = 0.7, 1.0, 2.5


@dataclass(frozen=True)
class MatMulWeight:
    """A constant weight that the graph multiplies with.

    Attributes:
        is_transposed: the graph stores [outputs, inputs] and transposes.
        has_quantized_input: the input is quantized too.
    """

    nbytes: int
    dtype: str
    is_transposed: bool
    has_quantized_input: bool

    @property
    def is_quantized(self) -> bool:
        """True for codes."""
        return self.dtype in _QUANTIZED

    @property
    def code(self) -> int:
        """Bytes of the kernels that multiply with it, and of those around them."""
        if not self.is_quantized:
            return _CODE_16_BITS
        return _CODE_QUANTIZED_INPUT if self.has_quantized_input else _CODE_WEIGHT_ONLY

    @property
    def copies(self) -> float:
        """Copies of the weight in memory at the peak."""
        if not self.is_quantized:
            return _COPIES_16_BITS
        return _COPIES_UNPACKED if self.dtype == "int4" and self.is_transposed else _COPIES_QUANTIZED


@dataclass(frozen=True)
class WeightSummary:
    """The weights of a graph, as stored."""

    bytes_by_dtype: Mapping[str, int]
    matmuls: tuple[MatMulWeight, ...]

    @property
    def data_bytes(self) -> int:
        """All stored bytes."""
        return sum(self.bytes_by_dtype.values())


@dataclass(frozen=True)
class Forecast:
    """The memory that a build is expected to take, and the size of its result.

    Attributes:
        data_bytes: weights in the graph's data.
        peak_bytes: memory of the building process at its peak.
    """

    data_bytes: int
    plan_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        return f"about {readable(self.peak_bytes)} of memory and a plan of {readable(self.plan_bytes)}"


def readable(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def forecast_build(weights: WeightSummary) -> Forecast:
    """Forecast a build of a plan with two profiles."""
    code = _CODE + sum(one.code for one in weights.matmuls)
    copies = sum(one.copies * one.nbytes for one in weights.matmuls)
    peak = _PROCESS + _COMPILING * code + 2 * weights.data_bytes + copies
    return Forecast(weights.data_bytes, weights.data_bytes + code, int(peak))


def summarize_weights(path: Path) -> WeightSummary:
    """Return the sizes of the weights in an ONNX file, without reading them."""
    graph = onnx.load(str(path), load_external_data=False).graph
    by_dtype: dict[str, int] = {}
    for tensor in graph.initializer:
        dtype = _DTYPES.get(tensor.data_type, "other")
        by_dtype[dtype] = by_dtype.get(dtype, 0) + _stored_bytes(tensor)
    return WeightSummary(by_dtype, tuple(_matmuls(graph)))


def _matmuls(graph: GraphProto) -> list[MatMulWeight]:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        name, ops = _way_to(node.input[1], makers)
        if name not in tensors:
            continue
        source = makers.get(node.input[0])
        found.append(
            MatMulWeight(
                _stored_bytes(tensors[name]),
                _DTYPES.get(tensors[name].data_type, "other"),
                "Transpose" in ops,
                source is not None and source.op_type == "DequantizeLinear",
            )
        )
    return found


def _way_to(name: str, makers: Mapping[str, NodeProto]) -> tuple[str, list[str]]:
    """Return the tensor that a weight is made from, and the ops in between."""
    ops = []
    while name in makers and makers[name].op_type in _PASSED_ON:
        ops.append(makers[name].op_type)
        name = makers[name].input[0]
    return name, ops


def _stored_bytes(tensor: TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.raw_data) or math.prod(tensor.dims) * _ITEM_BITS.get(tensor.data_type, 16) // 8
