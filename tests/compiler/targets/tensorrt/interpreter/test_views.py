"""Layers that move elements by position, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from interpreting import Network, check_op, graph, interpret, node, numbers

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

X = numbers(3, 5, 8)
_END = 2**63 - 1


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# Shapes -------------------------------------------------------------------------------------------------------------


def test_shape() -> None:
    check_op([node("Shape", "x", "a"), node("Shape", "x", "b", start=1, end=2)], {"x": X}, outputs="a b")
    check_op(node("Size", "x"), {"x": X})


@pytest.mark.parametrize("sizes", [(0, -1, 2, 4), (15, 8), (-1,), (0, 0, 4, 2)])
def test_reshape(sizes: tuple[int, ...]) -> None:
    check_op(node("Reshape", "x s"), {"x": X}, {"s": ints(*sizes)})
    check_op(node("Reshape", "x s"), {"x": X, "s": ints(*sizes)}, static=True, dtypes=["fp32"])


def test_reshape_where_zero_is_a_size() -> None:
    empty = np.zeros((2, 0, 3), np.float32)
    check_op(node("Reshape", "x s", allowzero=1), {"x": empty}, {"s": ints(0, 6)}, dtypes=["fp32"], static=True)


def test_reshape_to_a_scalar() -> None:
    check_op(node("Reshape", "x s"), {"x": X[:1, :1, :1]}, {"s": ints()}, dtypes=["fp32"], static=True)


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1), (1, 0, 2)])
def test_transpose(order: tuple[int, ...]) -> None:
    check_op(node("Transpose", "x", perm=list(order)), {"x": X})


def test_shuffle_does_all_three_steps() -> None:
    net = Network()
    layer = net.network.add_shuffle(net.input("x", X))
    layer.first_transpose, layer.reshape_dims, layer.second_transpose = (2, 0, 1), (4, 0, 10), (1, 2, 0)
    net.output(layer.get_output(0))
    expected = X.transpose(2, 0, 1).reshape(4, 3, 10).transpose(1, 2, 0)
    np.testing.assert_array_equal(run(net.network, {"x": X})["y"], expected)


def test_squeeze_and_unsqueeze() -> None:
    x = X[:, None, :, :, None]
    check_op(node("Squeeze", "x a"), {"x": x}, {"a": ints(1, -1)})
    check_op(node("Squeeze", "x"), {"x": x})
    check_op(node("Unsqueeze", "x a"), {"x": X}, {"a": ints(-1, 1)})
    check_op(node("Unsqueeze", "x a"), {"x": X}, {"a": ints(0, 3)})


# Slices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ((1,), (_END,), (1,), (2,)),
        ((-3,), (_END,), (2,), (1,)),
        ((0, 1), (2, 4), (0, 2), (1, 3)),
        ((-1,), (-(2**63),), (2,), (-1,)),
        ((7,), (1,), (2,), (-2,)),
        ((4,), (4,), (1,), (1,)),
        ((0, -2, 3), (9, 9, -1), (2, 1, 0), (1, 1, 1)),
    ],
)
def test_slice(starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...], steps: tuple[int, ...]) -> None:
    values = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes), "t": ints(*steps)}
    check_op(node("Slice", "x s e a t"), {"x": X}, values)


def test_slice_by_inputs() -> None:
    check_op(node("Slice", "x s e a"), {"x": X, "s": ints(1), "e": ints(4)}, {"a": ints(1)}, static=True)
    check_op(node("Slice", "x s e a"), {"x": X, "s": ints(-2, 0), "e": ints(_END, 2)}, {"a": ints(2, 1)}, static=True)


def test_slice_reads_axes_from_an_input() -> None:
    net = Network()
    layer = net.network.add_slice(net.input("x", X), (), (), ())
    for index, value in ((1, ints(2, 1)), (2, ints(2, 2)), (3, ints(2, 1)), (5, ints(2, 0))):
        layer.set_input(index, net.constant(value))
    net.output(layer.get_output(0))
    np.testing.assert_array_equal(run(net.network, {"x": X})["y"], X[1:3, :, 2:6:2])


def test_slice_beyond_the_end_is_an_error() -> None:
    net = Network()
    layer = net.network.add_slice(net.input("x", X), (0, 0, 0), (3, 5, 2), (1, 1, 1))
    layer.set_input(1, net.input("s", ints(0, 0, 0)))
    net.output(layer.get_output(0))
    np.testing.assert_array_equal(run(net.network, {"x": X, "s": ints(0, 0, 6)})["y"], X[:, :, 6:])
    for start in (7, -1):
        with pytest.raises(ValueError, match=f"SLICE .* positions {start} to {start + 1} of a dimension of 8"):
            run(net.network, {"x": X, "s": ints(0, 0, start)})


def test_split() -> None:
    check_op(node("Split", "x", "a b", num_outputs=2, axis=-1), {"x": X}, outputs="a b")
    check_op(node("Split", "x s", "a b c", axis=2), {"x": X}, {"s": ints(1, 5, 2)}, outputs="a b c")


def test_expand() -> None:
    check_op(node("Expand", "x s"), {"x": X[:, :1]}, {"s": ints(2, 1, 5, 1)})
    check_op(node("Expand", "x s"), {"x": X[:, :1], "s": ints(3, 4, 1)}, static=True)


def test_tile() -> None:
    check_op(node("Tile", "x r"), {"x": X}, {"r": ints(1, 2, 3)})


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad(mode: str) -> None:
    check_op(node("Pad", "x p", mode=mode), {"x": X}, {"p": ints(1, 2, 0, 0, 1, 3)})


def test_pad_with_a_value() -> None:
    check_op(node("Pad", "x p v"), {"x": X}, {"p": ints(0, 2, 0, 1, 0, 3), "v": np.float32(-7)[...]}, dtypes=["fp16"])


def test_reflection_of_a_single_element() -> None:
    net = Network()
    layer = net.network.add_slice(net.input("x", X[:, :1]), (0, -1, 0), (3, 3, 8), (1, 1, 1))
    layer.mode = net.library.SampleMode.REFLECT
    net.output(layer.get_output(0))
    np.testing.assert_array_equal(run(net.network, {"x": X[:, :1]})["y"], np.repeat(X[:, :1], 3, axis=1))


def test_concatenation() -> None:
    check_op(node("Concat", "x c", axis=-2), {"x": X}, {"c": numbers(3, 2, 8, seed=1)}, static=True)
    check_op(node("Concat", "x x x", axis=0), {"x": X})


def test_an_empty_slice_keeps_its_dtype() -> None:
    model = graph([node("Slice", "x s e a")], {"x": X}, {"s": ints(2), "e": ints(2), "a": ints(0)}, ["y"])
    y = interpret(model, {"x": X})["y"]
    assert y.shape == (0, 5, 8) and y.dtype == np.float32
