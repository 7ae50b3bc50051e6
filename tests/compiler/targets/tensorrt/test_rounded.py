"""A rounded graph gives the numbers of a runtime that rounds after each op, in fp16 and bf16."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.compiler.targets.tensorrt.rounded import rounded_model

KINDS = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}


def model(kind: int, nodes: list[onnx.NodeProto], initializers: Sequence[onnx.TensorProto] = ()) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", kind, ["N", 8])
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def run(given: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(rounded_model(given).SerializeToString())
    (y,) = session.run(None, {"x": x.astype(np.float32)})
    return y


def numbers(dtype: type, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((5, 8)) * scale).astype(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_each_result_is_rounded(kind: int) -> None:
    dtype = KINDS[kind]
    third = numpy_helper.from_array(np.array(1 / 3, np.float32).astype(dtype), "third")
    nodes = [helper.make_node("Mul", ["x", "x"], ["a"]), helper.make_node("Add", ["a", "third"], ["b"])]
    nodes += [helper.make_node("Sub", ["b", "a"], ["y"])]  # would be a third without rounding
    x = numbers(dtype, 3.0)
    got = run(model(kind, nodes, [third]), x)
    wide = x.astype(np.float32)
    a = (wide * wide).astype(dtype).astype(np.float32)
    b = (a + np.float32(np.float32(1 / 3).astype(dtype))).astype(dtype).astype(np.float32)
    assert got.dtype == np.float32
    assert np.array_equal(got, (b - a).astype(dtype).astype(np.float32))
    assert len(set(got.ravel().tolist())) > 5


def test_a_number_beyond_the_range_becomes_infinite() -> None:
    nodes = [helper.make_node("Mul", ["x", "x"], ["a"]), helper.make_node("Sqrt", ["a"], ["y"])]
    x = np.full((1, 8), 300.0, np.float32)
    assert np.isinf(run(model(TensorProto.FLOAT16, nodes), x)).all()
    assert np.isfinite(run(model(TensorProto.BFLOAT16, nodes), x)).all()


def test_ops_that_move_numbers_stay_as_they_are() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["a"], perm=[1, 0]), helper.make_node("Neg", ["a"], ["y"])]
    rewritten = rounded_model(model(TensorProto.FLOAT16, nodes)).graph
    assert [node.op_type for node in rewritten.node] == ["Transpose", "Neg"]
    assert rewritten.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_float32_parts_are_not_rounded() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "a"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT16),
    ]
    x = numbers(np.float16)
    got = run(model(TensorProto.FLOAT16, nodes), x)
    wide = x.astype(np.float32)
    assert np.array_equal(got, (wide * wide).astype(np.float16).astype(np.float32))
    types = [node.op_type for node in rounded_model(model(TensorProto.FLOAT16, nodes)).graph.node]
    assert types.count("Cast") == 4, "the result of Mul stays in float32; the last cast rounds and widens"


def test_the_model_itself_stays_as_it_is() -> None:
    given = model(TensorProto.FLOAT16, [helper.make_node("Abs", ["x"], ["y"])])
    before = given.SerializeToString()
    rounded_model(given)
    assert given.SerializeToString() == before
