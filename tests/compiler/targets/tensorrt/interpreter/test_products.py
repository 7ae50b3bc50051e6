"""Layers that multiply and sum, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from interpreting import Network, check_op, node, numbers

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

X = numbers(3, 5, 8)


def test_matrix_multiply() -> None:
    check_op(node("MatMul", "x w"), {"x": X}, {"w": numbers(8, 4, seed=1)})
    check_op(node("MatMul", "x w"), {"x": X}, {"w": numbers(8, seed=1)})
    check_op(node("MatMul", "a b"), {"a": numbers(2, 3, 4, 8), "b": numbers(2, 3, 8, 5, seed=1)}, static=True)
    check_op(node("MatMul", "a b"), {"a": numbers(2, 3, 4, 8), "b": numbers(1, 3, 8, 5, seed=1)}, static=True)


def test_transposed_weight() -> None:
    nodes = [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t")]
    check_op(nodes, {"x": X}, {"w": numbers(4, 8, seed=1)})


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_gemm(trans_a: int, trans_b: int) -> None:
    a, b = numbers(6, 6), numbers(6, 6, seed=1)
    gemm = node("Gemm", "a b c", transA=trans_a, transB=trans_b, alpha=0.5, beta=2.0)
    check_op(gemm, {"a": a}, {"b": b, "c": numbers(6, seed=2)}, dtypes=["fp32"], static=True)


@pytest.mark.parametrize(("op0", "op1"), [("NONE", "TRANSPOSE"), ("TRANSPOSE", "NONE"), ("TRANSPOSE", "TRANSPOSE")])
def test_transposing_operands(op0: str, op1: str) -> None:
    net = Network()
    a = numbers(2, 3, 8) if op0 == "NONE" else numbers(2, 8, 3)
    b = numbers(1, 8, 4, seed=1) if op1 == "NONE" else numbers(1, 4, 8, seed=1)
    kinds = net.library.MatrixOperation
    layer = net.network.add_matrix_multiply(
        net.input("a", a), getattr(kinds, op0), net.input("b", b), getattr(kinds, op1)
    )
    net.output(layer.get_output(0))
    left, right = (a if op0 == "NONE" else a.swapaxes(1, 2)), (b if op1 == "NONE" else b.swapaxes(1, 2))
    np.testing.assert_allclose(run(net.network, {"a": a, "b": b})["y"], left @ right, rtol=1e-5, atol=1e-5)


def test_products_of_vectors_are_refused() -> None:
    net = Network()
    a, b = numbers(2, 3, 8), numbers(2, 8)
    kinds = net.library.MatrixOperation
    layer = net.network.add_matrix_multiply(net.input("a", a), kinds.NONE, net.input("b", b), kinds.VECTOR)
    net.output(layer.get_output(0))
    with pytest.raises(NotImplementedError, match="products of vectors, in MATRIX_MULTIPLY"):
        run(net.network, {"a": a, "b": b})


def test_sums_of_products_are_rounded_once() -> None:
    """The first partial sum overflows float16, the whole one doesn't."""
    x = np.array([[60000, 60000, -60000, -60000]], np.float32)
    check_op(node("MatMul", "x w"), {"x": x}, {"w": np.ones((4, 1), np.float32)}, dtypes=["fp16"])


@pytest.mark.parametrize("equation", ["bsd,btd->bst", "bsd,btd->tb", "bsd,btd->b"])
def test_einsum(equation: str) -> None:
    feeds = {"a": X, "b": numbers(3, 4, 8, seed=1)}
    check_op(node("Einsum", "a b", equation=equation), feeds, dtypes=["fp32", "bf16"], static=True)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [2, 0]},
        {"pads": [1, 2], "strides": [2]},
        {"dilations": [2], "pads": [0, 1]},
        {"group": 2},
    ],
)
def test_convolution(attributes: dict[str, object]) -> None:
    kernel = numbers(6, 4 // int(attributes.get("group", 1)), 3, seed=1)  # type: ignore[call-overload]
    values = {"w": kernel, "b": numbers(6, seed=2)}
    check_op(node("Conv", "x w b", **attributes), {"x": numbers(2, 4, 7)}, values, dtypes=["fp32"])
    check_op(node("Conv", "x w", **attributes), {"x": numbers(2, 4, 7)}, {"w": kernel}, dtypes=["fp32"])


def test_convolution_of_two_dimensions() -> None:
    values = {"w": numbers(6, 2, 3, 2, seed=1)}
    conv = node("Conv", "x w", group=2, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2])
    check_op(conv, {"x": numbers(2, 4, 7, 6)}, values, dtypes=["fp32"])
