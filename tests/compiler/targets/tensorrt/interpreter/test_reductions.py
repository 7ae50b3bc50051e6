"""Layers that combine elements along axes, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from interpreting import Network, check_op, node, numbers

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

X = numbers(3, 5, 8)
GAIN, BIAS = numbers(8, seed=1), numbers(8, seed=2)


@pytest.mark.parametrize("kind", "ReduceSum ReduceMax ReduceMin ReduceMean ReduceProd ReduceL1".split())
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduce(kind: str, keepdims: int) -> None:
    dtypes = ["fp32", "bf16"] if kind in ("ReduceProd", "ReduceL1") else ["fp32", "fp16", "bf16"]
    check_op(node(kind, "x a", keepdims=keepdims), {"x": X}, {"a": np.array([-1])}, dtypes=dtypes, roundings=2)
    check_op(node(kind, "x a", keepdims=keepdims), {"x": X}, {"a": np.array([0, 2])}, dtypes=["fp32"])
    check_op(node(kind, "x", keepdims=keepdims), {"x": X[:2, :2, :3]}, dtypes=["fp32"])


def test_composed_reductions() -> None:
    axes = {"a": np.array([1])}
    check_op(node("ReduceL2", "x a"), {"x": X}, axes, dtypes=["fp32", "bf16"])
    check_op(node("ReduceLogSumExp", "x a"), {"x": X}, axes, dtypes=["fp32"])
    check_op(node("ReduceSumSquare", "x a"), {"x": X}, axes, dtypes=["fp32"])


def test_reduce_integers() -> None:
    x = np.array([[3, -4, 2**40], [1, 5, 0]])
    for kind in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"):
        check_op(node(kind, "x a"), {"x": x}, {"a": np.array([1])}, dtypes=["fp32"])
    check_op(node("ReduceMax", "x a"), {"x": x.astype(np.int32)}, {"a": np.array([1])}, dtypes=["fp32"])


def test_sums_of_halves_are_exact() -> None:
    """A sum in float16 would stop at 2048."""
    check_op(node("ReduceSum", "x a"), {"x": np.ones((1, 4000), np.float32)}, {"a": np.array([1])}, dtypes=["fp16"])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax(axis: int) -> None:
    check_op(node("Softmax", "x", axis=axis), {"x": X * 10})


def test_log_softmax() -> None:
    check_op(node("LogSoftmax", "x", axis=-1), {"x": X}, dtypes=["fp32"])


def test_layer_norm() -> None:
    norm = node("LayerNormalization", "x g b", axis=-1, epsilon=0.5)
    check_op(norm, {"x": X + 2}, {"g": GAIN, "b": BIAS}, roundings=2)
    check_op(node("LayerNormalization", "x g", axis=-1, epsilon=0.5), {"x": X}, {"g": GAIN}, dtypes=["fp32", "fp16"])
    gain = numbers(5, 8, seed=3)
    check_op(node("LayerNormalization", "x g", axis=1), {"x": X}, {"g": gain}, dtypes=["fp32"])


def test_rms_norm() -> None:
    """The parser writes it in several layers, whose last two round."""
    check_op(node("RMSNormalization", "x g", axis=-1, epsilon=0.5), {"x": X + 2}, {"g": GAIN}, roundings=2)
    gain = numbers(5, 8, seed=3)
    check_op(node("RMSNormalization", "x g", axis=-2), {"x": X}, {"g": gain}, dtypes=["fp32"])


def test_norm_of_large_halves_does_not_overflow() -> None:
    check_op(node("RMSNormalization", "x g", axis=-1), {"x": X * 20000}, {"g": GAIN}, roundings=2, dtypes=["fp16"])
    norm = node("LayerNormalization", "x g b", axis=-1)
    check_op(norm, {"x": X * 20000}, {"g": GAIN, "b": BIAS}, roundings=2, dtypes=["fp16"])


def test_norm_of_groups_is_refused() -> None:
    net = Network()
    x = numbers(1, 4, 3)
    ones = [net.constant(np.ones((1, 2, 1), np.float32)) for _ in range(2)]
    layer = net.network.add_normalization(net.input("x", x), *ones, 1 << 2)
    layer.num_groups = 2
    net.output(layer.get_output(0))
    with pytest.raises(NotImplementedError, match="a norm of 2 groups, in NORMALIZATION"):
        run(net.network, {"x": x})


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumulative_sum(exclusive: int, reverse: int) -> None:
    total = node("CumSum", "x a", exclusive=exclusive, reverse=reverse)
    check_op(total, {"x": X}, {"a": np.array(1)}, dtypes=["fp32"])
    check_op(total, {"x": np.arange(12).reshape(3, 4)}, {"a": np.array(-1)}, dtypes=["fp32"])
