"""Evaluation of whole networks."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from interpreting import Network, graph, interpret, node, numbers

from llmc.compiler.targets.tensorrt.interpreter import run as running
from llmc.compiler.targets.tensorrt.interpreter.run import run
from llmc.compiler.targets.tensorrt.interpreter.table import KINDS, Kind

pytest.importorskip("tensorrt_rtx")

X = numbers(3, 5)
NODES = [node("Neg", "x", "a"), node("Exp", "a", "b"), node("Add", "b x")]


def parsed() -> Network:
    net = Network()
    net.parse(graph(NODES, {"x": X}, {}, ["y"]))
    return net


def test_outputs_and_kept_tensors_are_returned() -> None:
    net = parsed()
    found = run(net.network, {"x": X}, keep=["a"])
    assert found.keys() == {"y", "a"}
    np.testing.assert_array_equal(found["a"], -X)
    np.testing.assert_array_equal(run(net.network, {"x": X})["y"], found["y"])


def test_layers_are_sorted() -> None:
    """The order of a network's layers is not that of their values."""
    net = Network()
    network = net.parse(graph([node("TopK", "x k", "v i", axis=-1)], {"x": X}, {"k": np.array([2])}, ["v", "i"]))
    assert network.get_layer(0).type.name == "TOPK"
    np.testing.assert_array_equal(run(network, {"x": X})["v"], -np.sort(-X)[:, :2])


def test_layers_keep_their_class() -> None:
    net = parsed()
    layers = [net.network.get_layer(i) for i in range(net.network.num_layers)]
    layers[0].__class__ = net.library.IUnaryLayer
    run(net.network, {"x": X})
    assert [type(layer) for layer in layers] == [net.library.IUnaryLayer, net.library.ILayer, net.library.ILayer]


def test_other_layers_are_refused() -> None:
    net = Network()
    image = numbers(1, 2, 4, 4)
    layer = net.network.add_pooling_nd(net.input("x", image), net.library.PoolingType.MAX, (2, 2))
    layer.name = "shrink"
    net.output(layer.get_output(0))
    with pytest.raises(NotImplementedError, match="does not cover the layer POOLING shrink"):
        run(net.network, {"x": image})


def test_loops_are_refused() -> None:
    net = Network()
    loop = net.network.add_loop()
    loop.add_trip_limit(net.constant(np.array(2, np.int32)), net.library.TripLimit.COUNT)
    recurrence = loop.add_recurrence(net.input("x", X))
    twice = net.network.add_elementwise(
        recurrence.get_output(0), recurrence.get_output(0), net.library.ElementWiseOperation.SUM
    )
    recurrence.set_input(1, twice.get_output(0))
    net.output(loop.add_loop_output(recurrence.get_output(0), net.library.LoopOutput.LAST_VALUE).get_output(0))
    with pytest.raises(NotImplementedError, match="TRIP_LIMIT"):
        run(net.network, {"x": X})


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"inputs are \['x'\], but the feeds are \[\]"),
        ({"x": X, "z": X}, "the feeds are .*'z'"),
        ({"x": X.astype(np.float16)}, "Input x is float16, but the network takes FLOAT"),
        ({"x": X[:, :4]}, r"x is \(3, 4\), but TensorRT inferred \(-1, 5\)"),
        ({"x": X[0]}, r"x is \(5,\), but TensorRT inferred"),
    ],
)
def test_wrong_feeds_are_refused(feeds: dict[str, np.ndarray], message: str) -> None:
    net = parsed()
    with pytest.raises(ValueError, match=message):
        run(net.network, feeds)


def test_shapes_must_be_those_that_tensorrt_inferred(monkeypatch: pytest.MonkeyPatch) -> None:
    net = parsed()
    kind = Kind("IUnaryLayer", lambda call: call.input(0)[:, :2])
    monkeypatch.setattr(running, "KINDS", KINDS | {"UNARY": kind})
    with pytest.raises(ValueError, match=r"UNARY Neg_a can't be evaluated: a is \(3, 2\), but TensorRT inferred"):
        run(net.network, {"x": X})


def test_results_are_rounded_to_the_dtype_of_the_tensor() -> None:
    x = np.array([1000], np.float16)
    model = graph([node("Add", "x c", "a"), node("Sub", "a x")], {"x": x}, {"c": np.float16(0.25)[...]}, ["y"])
    assert interpret(model, {"x": x})["y"].tolist() == [0]


def test_values_that_nothing_reads_any_more_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the running value is in memory, whatever the number of layers."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def negate(call: Any) -> np.ndarray:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        value = np.negative(call.input(0))
        alive.append(weakref.ref(value))
        return value

    names = [f"v{i}" for i in range(20)]
    nodes = [node("Neg", a, b) for a, b in zip(["x", *names], [*names, "y"], strict=True)]
    net = Network()
    network = net.parse(graph(nodes, {"x": X}, {}, ["y"]))
    monkeypatch.setattr(running, "KINDS", KINDS | {"UNARY": Kind("IUnaryLayer", negate)})
    run(network, {"x": X})
    assert len(alive) == 21 and most == 1


def test_layers_that_no_output_needs_are_not_evaluated() -> None:
    """A rewritten network has them: TensorRT can't remove a layer."""
    net = parsed()
    beyond = net.network.add_slice(net.network.get_input(0), (0, 4), (1, 1), (1, 1)).get_output(0)
    beyond.name = "beyond"
    np.testing.assert_allclose(run(net.network, {"x": X})["y"], X + np.exp(-X), rtol=1e-6)
    np.testing.assert_array_equal(run(net.network, {"x": X}, keep=["beyond"])["beyond"], X[:1, 4:])
    with pytest.raises(ValueError, match="SLICE"):
        run(net.network, {"x": X[:0]}, keep=["beyond"])
    assert run(net.network, {"x": X[:0]})["y"].shape == (0, 5)


def test_an_input_may_be_an_output() -> None:
    net = Network()
    x = net.input("x", X)
    net.output(net.network.add_unary(x, net.library.UnaryOperation.NEG).get_output(0))
    found = run(net.network, {"x": X}, keep=["x"])
    assert found["x"] is not X
    np.testing.assert_array_equal(found["x"], X)
