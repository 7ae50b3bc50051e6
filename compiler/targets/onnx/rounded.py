"""A half-precision graph as one in float32 that rounds every result to that precision.

ONNX Runtime has few kernels in half precision on a CPU: it computes chains of them in float32, or not at all. A GPU
rounds after each kernel. So each value of the graph becomes a float32 one, and after each op that computes, its result
is rounded:

    y = Mul(a, b)  becomes  y' = Mul(a, b);  y = Cast(Cast(y', to=FLOAT16), to=FLOAT)
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import AttributeProto, TensorProto, helper

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Ops that move numbers and compute none: what they return is rounded already.
_MOVES = frozenset(
    "Identity Reshape Transpose Squeeze Unsqueeze Expand Slice Split Concat Gather GatherElements GatherND Where "
    "TensorScatter ScatterElements ScatterND Flatten Tile Pad Max Min ReduceMax ReduceMin TopK Neg Abs Relu Compress "
    "Trilu ReverseSequence If Loop".split()
)


def rounded_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model; its weights stay where they are, and half-precision ones are converted when it is opened."""
    types = {info.name: info.type.tensor_type.elem_type for info in _all_types(model)}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type in HALF:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.data_type in HALF:
            renamed[tensor.name] = wide = f"{tensor.name}/wide"
            nodes.append(helper.make_node("Cast", [tensor.name], [wide], name=wide, to=TensorProto.FLOAT))
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        nodes += _rounded(node, types)
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _all_types(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    """Yield all values of the graph with their types."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=False).graph
    yield from (*inferred.input, *inferred.output, *inferred.value_info)


def _rounded(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[onnx.NodeProto]:
    """Yield a node, in float32, and what rounds its results."""
    half = {name: types[name] for name in node.output if types.get(name) in HALF}
    for attribute in node.attribute:
        if attribute.name in ("to", "output_dtype", "dtype") and attribute.i in HALF:
            attribute.i = TensorProto.FLOAT
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in HALF:
            value = onnx.numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(value))
    if node.op_type in _MOVES or not half:
        yield node
        return
    for i, name in enumerate(node.output):
        if name in half:
            node.output[i] = f"{name}/exact"
    yield node
    for name, kind in half.items():
        yield helper.make_node("Cast", [f"{name}/exact"], [f"{name}/half"], name=f"{name}/half", to=kind)
        yield helper.make_node("Cast", [f"{name}/half"], [name], name=f"{name}/rounded", to=TensorProto.FLOAT)
