"""A rounded graph gives the numbers of half precision, although it computes in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.compiler.targets.onnx.rounded import rounded_model

MICROSOFT = "com.microsoft"
HALF = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
KINDS = pytest.mark.parametrize("kind", HALF)
# 1/3 of a unit in the last place of fp16 and bf16 is lost in each sum or product of these.
X = np.linspace(-3.1, 2.7, 12, dtype=np.float32).reshape(1, 3, 4)
W = np.linspace(-1.9, 2.3, 16, dtype=np.float32).reshape(4, 4)


def model(nodes: Sequence[onnx.NodeProto], kind: int, weights: dict[str, np.ndarray], outputs: Sequence[str]) -> Any:
    """Return a model with the input x, whose floats are all of one kind.

    The types of results aren't declared, but those of their copies.
    """
    stored = [
        numpy_helper.from_array(value.astype(HALF[kind]) if value.dtype == np.float32 else value, name)
        for name, value in weights.items()
    ]
    graph = helper.make_graph(
        [*nodes, *(helper.make_node("Identity", [name], [f"{name} copy"]) for name in outputs)],
        "half",
        [helper.make_tensor_value_info("x", kind, [1, None, 4])],
        [helper.make_tensor_value_info(f"{name} copy", kind, None) for name in outputs],
        stored,
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def run(made: onnx.ModelProto, kind: int) -> list[np.ndarray]:
    """Run the rounded model; check that every result has numbers of the kind."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(rounded_model(made).SerializeToString(), options)
    found = session.run(None, {"x": to(kind, X)})
    for value in found:
        np.testing.assert_array_equal(value, to(kind, value))
    return found


def to(kind: int, values: np.ndarray) -> np.ndarray:
    return values.astype(HALF[kind]).astype(np.float32)


@KINDS
def test_each_result_is_rounded(kind: int) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Add", ["square", "x"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "third"], ["exact"]),
        helper.make_node("Cast", ["exact"], ["y"], to=kind),
    ]
    made = model(nodes, kind, {}, ["sum", "y"])
    made.graph.initializer.append(numpy_helper.from_array(np.array(1 / 3, np.float32), "third"))
    total, y = run(made, kind)
    x = to(kind, X)
    wanted = to(kind, to(kind, x * x) + x)
    assert (wanted != to(kind, x * x + x)).any(), "the numbers don't show whether the square is rounded"
    np.testing.assert_array_equal(total, wanted)
    np.testing.assert_array_equal(y, to(kind, wanted * np.float32(1 / 3)))


@KINDS
def test_ops_outside_of_the_standard_and_those_after_them(kind: int) -> None:
    """Their types are not inferred, and without them nothing after them would be rounded."""
    nodes = [
        helper.make_node("FusedMatMul", ["x", "w"], ["product"], domain=MICROSOFT, transB=1),
        helper.make_node("Add", ["product", "product"], ["twice"]),
        helper.make_node(
            "SkipSimplifiedLayerNormalization", ["twice", "x", "gain"], ["normed", "", "", "sum"], domain=MICROSOFT
        ),
        helper.make_node("Mul", ["normed", "sum"], ["y"]),
    ]
    twice, normed, total, y = run(model(nodes, kind, {"w": W, "gain": W[0]}, ["twice", "normed", "sum", "y"]), kind)
    x = to(kind, X)
    np.testing.assert_allclose(twice, 2 * to(kind, x @ to(kind, W).T), rtol=1e-2)
    np.testing.assert_array_equal(total, to(kind, twice + x))
    np.testing.assert_array_equal(y, to(kind, normed * total))


@KINDS
def test_codes_are_dequantized_to_rounded_numbers(kind: int) -> None:
    codes = np.arange(128, dtype=np.uint8).reshape(8, 16)
    scales = np.linspace(0.011, 0.017, 8, dtype=np.float32).reshape(8, 1)
    gather = helper.make_node(
        "GatherBlockQuantized", ["codes", "ids", "scales"], ["y"], domain=MICROSOFT,
        bits=8, block_size=16, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    nodes = [gather, helper.make_node("Identity", ["x"], ["same"])]
    ids = np.array([[7, 0]])
    y, _ = run(model(nodes, kind, {"codes": codes, "scales": scales, "ids": ids}, ["y", "same"]), kind)
    exact = (codes.astype(np.float32) - 128) * to(kind, scales)
    np.testing.assert_array_equal(y[0], to(kind, exact)[[7, 0]])


@KINDS
def test_a_loop_and_the_sums_of_a_scatter(kind: int) -> None:
    """The loop adds x to one position of the total, three times; every sum is rounded."""
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "w0"], ["scaled"]),
            helper.make_node("ScatterND", ["total", "place", "scaled"], ["grown"], reduction="add"),
            helper.make_node("Identity", ["go_on"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("total", kind, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, None),
            helper.make_tensor_value_info("grown", kind, None),
        ],
    )
    loop = helper.make_node("Loop", ["trips", "", "start"], ["y"], body=body)
    weights = {"trips": np.array(3), "start": np.ones((1, 3, 4), np.float32), "w0": W[0], "place": np.array([[0]])}
    (y,) = run(model([loop], kind, weights, ["y"]), kind)
    scaled = to(kind, to(kind, X) * to(kind, W[0]))
    wanted = np.ones_like(X)
    for _ in range(3):
        wanted = to(kind, wanted + scaled)
    np.testing.assert_array_equal(y, wanted)


@KINDS
def test_caches_get_rounded_keys(kind: int) -> None:
    """GroupQueryAttention rotates keys on their way into the cache."""
    weights = {
        "cache": np.zeros((1, 1, 4, 16), np.float32),
        "last": np.array([2], np.int32),
        "longest": np.array(3, np.int32),
        "cos": np.cos(np.arange(32, dtype=np.float32)).reshape(4, 8),
        "sin": np.sin(np.arange(32, dtype=np.float32)).reshape(4, 8),
        "wide": np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "wide"], ["q"]),
        helper.make_node(
            "GroupQueryAttention", ["q", "q", "q", "cache", "cache", "last", "longest", "cos", "sin"],
            ["out", "keys", "values"], domain=MICROSOFT, num_heads=1, kv_num_heads=1, do_rotary=1,
        ),
        helper.make_node("Add", ["out", "out"], ["twice"]),
    ]  # fmt: skip
    q, _, keys, values = run(model(nodes, kind, weights, ["q", "twice", "keys", "values"]), kind)
    np.testing.assert_array_equal(values[0, 0, :3], q[0])
    angles = to(kind, weights["cos"])[2], to(kind, weights["sin"])[2]
    first, second = q[0, 2, :8], q[0, 2, 8:]
    np.testing.assert_allclose(keys[0, 0, 2, :8], first * angles[0] - second * angles[1], rtol=1e-2, atol=1e-2)


# Of single ops, whose result is declared ----------------------------------------------------------------------------


def of_nodes(kind: int, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", kind, ["N", 8])
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(nodes, "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def run_of(given: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(rounded_model(given).SerializeToString())
    (y,) = session.run(None, {"x": x.astype(np.float32)})
    return y


def numbers(dtype: type, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((5, 8)) * scale).astype(dtype)


def test_a_number_beyond_the_range_becomes_infinite() -> None:
    nodes = [helper.make_node("Mul", ["x", "x"], ["a"]), helper.make_node("Sqrt", ["a"], ["y"])]
    x = np.full((1, 8), 300.0, np.float32)
    assert np.isinf(run_of(of_nodes(TensorProto.FLOAT16, nodes), x)).all()
    assert np.isfinite(run_of(of_nodes(TensorProto.BFLOAT16, nodes), x)).all()


def test_ops_that_move_numbers_stay_as_they_are() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["a"], perm=[1, 0]), helper.make_node("Neg", ["a"], ["y"])]
    rewritten = rounded_model(of_nodes(TensorProto.FLOAT16, nodes)).graph
    assert [node.op_type for node in rewritten.node] == ["Transpose", "Neg"]
    assert rewritten.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_float32_parts_are_not_rounded() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "a"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT16),
    ]
    x = numbers(np.float16)
    got = run_of(of_nodes(TensorProto.FLOAT16, nodes), x)
    wide = x.astype(np.float32)
    assert np.array_equal(got, (wide * wide).astype(np.float16).astype(np.float32))
    types = [node.op_type for node in rounded_model(of_nodes(TensorProto.FLOAT16, nodes)).graph.node]
    assert types.count("Cast") == 4, "the result of Mul stays in float32; the last cast rounds and widens"


def test_the_model_itself_stays_as_it_is() -> None:
    given = of_nodes(TensorProto.FLOAT16, [helper.make_node("Abs", ["x"], ["y"])])
    before = given.SerializeToString()
    rounded_model(given)
    assert given.SerializeToString() == before
