"""Layers that read or write by indices, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from interpreting import Network, check_op, graph, interpret, node, numbers

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

X = numbers(3, 5, 8)


def random_indices(size: int, *shape: int) -> np.ndarray:
    """Return indices from -size to size - 1."""
    return np.random.default_rng(1).integers(-size, size, shape)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather(axis: int) -> None:
    """Negative indices count from the end."""
    check_op(node("Gather", "x i", axis=axis), {"x": X, "i": random_indices(X.shape[axis], 2, 6)})
    check_op(node("Gather", "x i", axis=axis), {"x": X}, {"i": np.array(-1)})
    check_op(node("Gather", "x i", axis=axis), {"x": X, "i": np.array([1], np.int32)})


def test_gather_beyond_the_end_is_an_error() -> None:
    net = Network()
    index = np.array([5])
    net.output(net.network.add_gather(net.input("x", X), net.input("i", index), 1).get_output(0))
    with pytest.raises(ValueError, match=r"GATHER .*index 5 is out of bounds"):
        run(net.network, {"x": X, "i": index})


@pytest.mark.parametrize("axis", [0, 2])
def test_gather_elements(axis: int) -> None:
    check_op(node("GatherElements", "x i", axis=axis), {"x": X, "i": random_indices(X.shape[axis], 3, 5, 8)})
    narrow = random_indices(8, 3, 5, 4)
    check_op(node("GatherElements", "x i", axis=2), {"x": X, "i": narrow})


def test_gather_nd() -> None:
    check_op(node("GatherND", "x i"), {"x": X, "i": random_indices(3, 4, 2)})
    check_op(node("GatherND", "x i"), {"x": X, "i": random_indices(3, 2, 4, 1)})
    check_op(node("GatherND", "x i", batch_dims=1), {"x": X, "i": random_indices(5, 3, 4, 1)})
    check_op(node("GatherND", "x i", batch_dims=2), {"x": X, "i": random_indices(8, 3, 5, 1)}, static=True)


def test_gather_with_elementwise_dimensions() -> None:
    """The parser makes no such layer of a Gather, but a polished network may have one."""
    for axis in (1, 2):
        net = Network()
        indices = random_indices(5, 3, 2)
        layer = net.network.add_gather(net.input("x", X), net.input("i", indices), axis)
        layer.num_elementwise_dims = 1
        net.output(layer.get_output(0))
        expected = np.stack([np.take(x, i, axis - 1) for x, i in zip(X, indices, strict=True)])
        np.testing.assert_array_equal(run(net.network, {"x": X, "i": indices})["y"], expected)


@pytest.mark.parametrize("axis", [0, 2])
def test_scatter_elements(axis: int) -> None:
    order = np.argsort(numbers(3, 5, 8, seed=3), axis=axis)
    indices = np.take(order, range(2), axis=axis)
    indices[..., 0] -= X.shape[axis]
    updates = numbers(*indices.shape, seed=2)
    check_op(node("ScatterElements", "x i u", axis=axis), {"x": X, "i": indices, "u": updates}, static=True)


def test_scatter_nd() -> None:
    indices = np.array([[0, 1], [2, -1], [1, 3]])
    check_op(node("ScatterND", "x i u"), {"x": X, "i": indices, "u": numbers(3, 8, seed=2)})
    check_op(node("ScatterND", "x i u"), {"x": X, "i": indices[:2, :1], "u": numbers(2, 5, 8, seed=2)})


def test_scatter_leaves_its_input_alone() -> None:
    feeds = {"x": X.copy(), "i": np.array([[0]]), "u": numbers(1, 5, 8, seed=2)}
    interpret(graph([node("ScatterND", "x i u")], feeds, {}, ["y"]), feeds)
    np.testing.assert_array_equal(feeds["x"], X)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis: int) -> None:
    indices = np.array([[0, 3, 1], [2, 2, 0]])
    values = {"d": np.array(4), "v": np.array([-1, 2], np.float32)}
    check_op(node("OneHot", "i d v", axis=axis), {"i": indices}, values, dtypes=["fp32", "bf16"])


def test_non_zero() -> None:
    net = Network()
    mask = X > 1
    net.output(net.network.add_non_zero(net.input("x", mask)).get_output(0))
    y = run(net.network, {"x": mask})["y"]
    np.testing.assert_array_equal(y, np.argwhere(mask).T)
    assert y.dtype == np.int32


# Order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 0])
def test_top_k(largest: int) -> None:
    top = node("TopK", "x k", "v i", axis=-1, largest=largest)
    check_op(top, {"x": X}, {"k": np.array([3])}, outputs="v i", dtypes=["fp32", "fp16"])
    check_op(top, {"x": X, "k": np.array([8])}, outputs="v i", dtypes=["fp32"], static=True)
    middle = node("TopK", "x k", "v i", axis=1, largest=largest)
    check_op(middle, {"x": X}, {"k": np.array([2])}, outputs="v i", dtypes=["fp32"])


@pytest.mark.parametrize("largest", [1, 0])
def test_top_k_of_equal_values_takes_the_earlier_one(largest: int) -> None:
    ties = np.array([[1, 2, 2, 1, 2, 1, 3, 3]], np.float32)
    top = node("TopK", "x k", "v i", axis=-1, largest=largest)
    check_op(top, {"x": ties}, {"k": np.array([8])}, outputs="v i", dtypes=["fp32"])
    integers = ties.astype(np.int64) - 2
    check_op(top, {"x": integers}, {"k": np.array([6])}, outputs="v i", dtypes=["fp32"])


def test_top_k_by_an_attribute() -> None:
    net = Network()
    layer = net.network.add_topk(net.input("x", X), net.library.TopKOperation.MAX, 2, 1 << 2)
    net.output(layer.get_output(0))
    net.output(layer.get_output(1), "i")
    found = run(net.network, {"x": X})
    np.testing.assert_array_equal(found["y"], -np.sort(-X, axis=2)[..., :2])
    assert found["i"].dtype == np.int32


def test_index_of_the_extremum() -> None:
    ties = np.round(X)
    for kind in ("ArgMax", "ArgMin"):
        for last in (0, 1):
            arg = node(kind, "x", axis=-1, keepdims=0, select_last_index=last)
            check_op(arg, {"x": ties}, dtypes=["fp32", "fp16"] if kind == "ArgMax" else ["fp32"])
