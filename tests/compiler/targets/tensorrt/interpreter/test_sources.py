"""Constants and sequences of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interpreting import BFLOAT16, Network, check_op, graph, interpret, node, numbers
from onnx import TensorProto, helper

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

X = numbers(4, 4)


@pytest.mark.parametrize(("start", "limit", "step"), [(0, 7, 1), (3, 20, 4), (5, 0, -2), (2, 2, 1)])
def test_range(start: int, limit: int, step: int) -> None:
    given = {"a": np.array(start), "b": np.array(limit), "c": np.array(step)}
    check_op(node("Range", "a b c"), given, dtypes=["fp32"], static=True)
    check_op(node("Range", "a b c"), {"b": given["b"]}, {"a": given["a"], "c": given["c"]}, dtypes=["fp32"])


def test_range_follows_a_size() -> None:
    nodes = [node("Shape", "x", "n", start=0, end=1), node("Squeeze", "n", "l"), node("Range", "zero l one")]
    check_op(nodes, {"x": X}, {"zero": np.array(0), "one": np.array(1)}, dtypes=["fp32"])


@pytest.mark.parametrize("upper", [0, 1])
def test_triangle(upper: int) -> None:
    """The parser compares the rows and columns that two fills make."""
    check_op(node("Trilu", "x k", upper=upper), {"x": numbers(5, 5)}, {"k": np.array(1)})


def test_static_fill() -> None:
    net = Network()
    library = net.library
    layer = net.network.add_fill((5,), library.FillOperation.LINSPACE, library.DataType.FLOAT)
    layer.alpha, layer.beta = 2.0, 0.5
    net.output(layer.get_output(0))
    np.testing.assert_array_equal(run(net.network, {})["y"], [2, 2.5, 3, 3.5, 4])


def test_random_numbers_are_refused() -> None:
    net = Network()
    library = net.library
    layer = net.network.add_fill((5,), library.FillOperation.RANDOM_UNIFORM, library.DataType.FLOAT)
    net.output(layer.get_output(0))
    with pytest.raises(NotImplementedError, match=r"random numbers .*in FILL"):
        run(net.network, {})


def test_constant_of_shape() -> None:
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [2.5])
    check_op([node("Shape", "x", "s"), node("ConstantOfShape", "s", value=value)], {"x": X}, dtypes=["fp32"])


@pytest.mark.parametrize(
    "value",
    [
        numbers(4),
        numbers(4).astype(np.float16),
        np.array([1, -(2**40)]),
        np.array([2, -3], np.int32),
        np.array([True, False]),
    ],
)
def test_constants_that_tensorrt_returns(value: np.ndarray) -> None:
    y = interpret(graph([node("Identity", "c")], {}, {"c": value}, ["y"]), {})["y"]
    np.testing.assert_array_equal(y, value)
    assert y.dtype == value.dtype


# Constants that TensorRT does not return ----------------------------------------------------------------------------


WEIGHT = numbers(4, 4, seed=1).astype(BFLOAT16)
FEEDS = {"x": X.astype(BFLOAT16)}


def product() -> Any:
    return graph([node("MatMul", "x w")], FEEDS, {"w": WEIGHT}, ["y"])


def test_a_constant_is_found_by_the_names_of_layer_and_output() -> None:
    by_layer = interpret(product(), FEEDS, {"w": WEIGHT})["y"]
    by_output = interpret(product(), FEEDS, {"w_output": WEIGHT})["y"]
    expected = FEEDS["x"].astype(np.float32) @ WEIGHT.astype(np.float32)
    for y in (by_layer, by_output):
        np.testing.assert_array_equal(y.astype(np.float32), expected.astype(BFLOAT16).astype(np.float32))


def test_an_unknown_constant_is_an_error() -> None:
    with pytest.raises(ValueError, match="TensorRT does not return the BF16 values of CONSTANT w; pass them"):
        interpret(product(), FEEDS)


@pytest.mark.parametrize("wrong", [WEIGHT[:2], WEIGHT.astype(np.float32)])
def test_a_constant_of_another_kind_is_an_error(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"CONSTANT w .*instead of BF16 \(4, 4\)"):
        interpret(product(), FEEDS, {"w": wrong})


def test_assertions() -> None:
    net = Network()
    sizes = net.network.add_shape(net.input("x", X)).get_output(0)
    same = net.library.ElementWiseOperation.EQUAL
    expected = net.input("n", np.array([4, 4]))
    net.network.add_assertion(net.network.add_elementwise(sizes, expected, same).get_output(0), "It is 4 by 4.")
    net.output(net.network.add_identity(net.input("z", X)).get_output(0))
    feeds = {"x": X, "z": X, "n": np.array([4, 4])}
    np.testing.assert_array_equal(run(net.network, feeds)["y"], X)
    with pytest.raises(AssertionError, match="It is 4 by 4"):
        run(net.network, feeds | {"n": np.array([4, 5])})
