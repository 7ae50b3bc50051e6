"""A half-precision graph as one in float32 that rounds every result to that precision.

ONNX Runtime has few kernels in half precision on a CPU: it computes chains of them in float32, or not at all. A GPU
rounds after each kernel. So each value of the graph becomes a float32 one, and after each op that computes, its result
is rounded:

    y = Mul(a, b)  becomes  y' = Mul(a, b);  y = Cast(Cast(y', to=FLOAT16), to=FLOAT)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import AttributeProto, GraphProto, TensorProto, helper

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Ops that move numbers and compute none: what they return is rounded already.
_MOVES = frozenset(
    "Identity Reshape Transpose Squeeze Unsqueeze Expand Slice Split Concat Gather GatherElements GatherND Where "
    "TensorScatter ScatterElements ScatterND Flatten Tile Pad Max Min ReduceMax ReduceMin TopK Neg Abs Relu Compress "
    "Trilu ReverseSequence If Loop".split()
)
# Ops that aren't of the ONNX standard -> for each result the index of the input that has its type; None: always float.
# Of other such ops, every result has the type of the first input.
_TYPED_BY: Mapping[str, tuple[int | None, ...]] = {
    "GatherBlockQuantized": (2,),
    "GroupQueryAttention": (0, 3, 4),
    "SkipSimplifiedLayerNormalization": (0, None, None, 0),
}
_ANY_SHAPE = "any shape"


def rounded_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model; its weights stay where they are, and half-precision ones are converted when it is opened."""
    types = {info.name: info.type.tensor_type.elem_type for info in _all_types(model)}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    renamed = {tensor.name: f"{tensor.name}/wide" for tensor in graph.initializer if tensor.data_type in HALF}
    casts = [helper.make_node("Cast", [old], [new], name=new, to=TensorProto.FLOAT) for old, new in renamed.items()]
    _round(graph, types, renamed)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _round(graph: GraphProto, types: Mapping[str, int], renamed: Mapping[str, str]) -> None:
    """Replace the nodes and the declared types of a graph, and of the graphs in it.

    Args:
        types: the types of all values by name.
        renamed: new names of half-precision weights.
    """
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type in HALF:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        for inner in _subgraphs(node):
            _round(inner, types, renamed)
        nodes += _rounded(node, types)
    del graph.node[:]
    graph.node.extend(nodes)


def _subgraphs(node: onnx.NodeProto) -> Iterator[GraphProto]:
    return (attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH)


def _all_types(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    """Yield all values of the graph, and of the graphs in it, with their types."""
    standard = onnx.ModelProto()
    standard.CopyFrom(model)
    standard.graph.input.append(helper.make_tensor_value_info(_ANY_SHAPE, TensorProto.INT64, [None]))
    _replace_others(standard.graph)
    inferred = onnx.shape_inference.infer_shapes(standard, strict_mode=True, data_prop=False)
    return _declared(inferred.graph)


def _declared(graph: GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _declared(inner)


def _replace_others(graph: GraphProto) -> None:
    """Replace the ops that inference doesn't know by standard ones whose results have the same types."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for inner in _subgraphs(node):
            _replace_others(inner)
        nodes += [node] if not node.domain else _of_same_type(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _of_same_type(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
    sources = _TYPED_BY.get(node.op_type, (0,) * len(node.output))
    for name, source in zip(node.output, sources, strict=False):
        if source is not None and name:
            yield helper.make_node("Reshape", [node.input[source], _ANY_SHAPE], [name])


def _moves(node: onnx.NodeProto) -> bool:
    """Return True for a node that computes no numbers; a scatter may add them."""
    return node.op_type in _MOVES and all(a.name != "reduction" or a.s == b"none" for a in node.attribute)


def _rounded(node: onnx.NodeProto, types: Mapping[str, int]) -> Iterator[onnx.NodeProto]:
    """Yield a node, in float32, and what rounds its results."""
    half = {name: types[name] for name in node.output if types.get(name) in HALF}
    for attribute in node.attribute:
        if attribute.name in ("to", "output_dtype", "dtype") and attribute.i in HALF:
            attribute.i = TensorProto.FLOAT
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in HALF:
            value = onnx.numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(value))
    if _moves(node) or not half:
        yield node
        return
    for i, name in enumerate(node.output):
        if name in half:
            node.output[i] = f"{name}/exact"
    yield node
    for name, kind in half.items():
        yield helper.make_node("Cast", [f"{name}/exact"], [f"{name}/half"], name=f"{name}/half", to=kind)
        yield helper.make_node("Cast", [f"{name}/half"], [name], name=f"{name}/rounded", to=TensorProto.FLOAT)
