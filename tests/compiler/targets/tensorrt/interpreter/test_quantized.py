"""Quantize and dequantize, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from interpreting import FLOAT8, INT4, Network, check_op, graph, interpret, node, numbers
from onnx import NodeProto, TensorProto

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

X = numbers(3, 5, 8)
SCALES = np.array([0.5, 0.25, 2, 0.125], np.float32)
CODES = np.random.default_rng(1).integers(-128, 128, (4, 8)).astype(np.int8)
NIBBLES = np.random.default_rng(1).integers(-8, 8, (4, 8)).astype(np.int8).astype(INT4)


def weight(**attributes: int) -> list[NodeProto]:
    """A product with a dequantized weight [O, I]."""
    dequantized = node("DequantizeLinear", "w s", "d", **attributes)
    return [dequantized, node("Transpose", "d", "t", perm=[1, 0]), node("MatMul", "x t")]


# Dequantize ---------------------------------------------------------------------------------------------------------


def test_dequantize_by_tensor() -> None:
    check_op(weight(), {"x": X}, {"w": CODES, "s": np.float32(0.3)[...]}, roundings=3, summed=True)


def test_dequantize_by_channel() -> None:
    check_op(weight(axis=0), {"x": X}, {"w": CODES, "s": SCALES}, roundings=3, summed=True)
    columns = [node("DequantizeLinear", "w s", "d", axis=1), node("MatMul", "x d")]
    check_op(columns, {"x": X}, {"w": CODES.T.copy(), "s": SCALES}, roundings=3, summed=True)


@pytest.mark.parametrize("codes", [CODES, NIBBLES])
@pytest.mark.parametrize("block", [2, 4])
def test_dequantize_by_block(codes: np.ndarray, block: int) -> None:
    scales = numbers(4, 8 // block, seed=2, low=0.1)
    check_op(weight(axis=1, block_size=block), {"x": X}, {"w": codes, "s": scales}, roundings=3, summed=True)


def test_dequantize_blocks_along_the_first_axis() -> None:
    scales = numbers(4, 4, seed=2, low=0.1)
    nodes = [node("DequantizeLinear", "w s", "d", axis=0, block_size=2), node("MatMul", "x d")]
    check_op(nodes, {"x": X}, {"w": CODES.T.copy(), "s": scales}, roundings=3, summed=True)


def test_dequantize_float8() -> None:
    codes = numbers(4, 8, seed=1, low=-448, high=448).astype(FLOAT8)
    check_op(weight(axis=0), {"x": X}, {"w": codes, "s": SCALES}, roundings=3, summed=True)


def test_dequantized_embedding() -> None:
    nodes = [node("DequantizeLinear", "w s", "d", axis=0), node("Gather", "d i")]
    check_op(nodes, {"i": np.array([[3, 0, 1]])}, {"w": CODES, "s": SCALES})


# Quantize -----------------------------------------------------------------------------------------------------------


def quantized(outputs: str = "y") -> NodeProto:
    return node("QuantizeLinear", "x s", outputs, output_dtype=TensorProto.INT8)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    halves = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 200, -128.5, -200], np.float32)
    check_op(quantized(), {"x": halves}, {"s": np.float32(1)[...]})
    check_op(quantized(), {"x": halves / 4}, {"s": np.float32(0.25)[...]})


def test_quantize_by_channel() -> None:
    channels = node("QuantizeLinear", "x s", axis=1, output_dtype=TensorProto.INT8)
    check_op(channels, {"x": X[:, :4]}, {"s": SCALES})


def test_quantize_with_a_zero_point() -> None:
    """TensorRT allows only 0, and the parser makes a float of it."""
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")]
    check_op(nodes, {"x": X}, {"s": np.float32(0.125)[...], "z": np.int8(0)[...]})


def test_quantize_to_float8() -> None:
    values = np.array([0, 1.06, -17, 448, 470, 1e4, -1e4, 2.0**-9, 0.3], np.float32)
    nodes = [node("QuantizeLinear", "x s", "q", output_dtype=TensorProto.FLOAT8E4M3FN), node("DequantizeLinear", "q s")]
    check_op(nodes, {"x": values}, {"s": np.float32(0.5)[...]})
    model = graph(nodes[:1], {"x": values}, {"s": np.float32(0.5)[...]}, ["q"])
    assert interpret(model, {"x": values})["q"].dtype == FLOAT8


def test_quantize_by_a_computed_scale() -> None:
    nodes = [
        node("Abs", "x", "a"),
        node("ReduceMax", "a", "m", keepdims=0),
        node("Mul", "m c", "s"),
        quantized("q"),
        node("DequantizeLinear", "q s"),
    ]
    check_op(nodes, {"x": X}, {"c": np.float32(1 / 127)[...]}, roundings=2, dtypes=["fp32"])


def test_product_of_codes_by_token() -> None:
    """Each token has a scale of its own: divide, quantize by 1, multiply the codes, and scale the product."""
    nodes = [
        node("Abs", "x", "a"),
        node("ReduceMax", "a axes", "m", keepdims=1),
        node("Div", "m c", "r"),
        node("Div", "x r", "n"),
        node("QuantizeLinear", "n one", "q", output_dtype=TensorProto.INT8),
        node("DequantizeLinear", "q one", "xq"),
        node("DequantizeLinear", "w s", "d", axis=0),
        node("Transpose", "d", "t", perm=[1, 0]),
        node("MatMul", "xq t", "p"),
        node("Mul", "p r"),
    ]
    # The largest number of each token is 127 times a power of two, so all quotients are exact, ties among them.
    codes = np.random.default_rng(3).integers(-127, 127, (3, 5, 8)) + np.float32(0.5)
    codes[..., 0] = -127
    codes = codes.astype(np.float32)
    x = codes * 2.0 ** -np.arange(5, dtype=np.float32)[:, None]
    constants = {"axes": np.array([-1]), "c": np.float32(127)[...], "one": np.float32(1)[...]}
    check_op(nodes, {"x": x}, constants | {"w": CODES, "s": SCALES / 64}, roundings=3, summed=True)


def test_quantize_by_block() -> None:
    """The parser reads no blocks of activations, but the network can have them."""
    net = Network()
    scales = numbers(4, 2, seed=2, low=0.1)
    x = numbers(4, 8, low=-20, high=20)
    layer = net.network.add_quantize(net.input("x", x), net.input("s", scales), net.library.DataType.INT8)
    layer.block_shape = (1, 4)
    net.output(layer.get_output(0))
    expected = np.clip(np.rint(x / np.repeat(scales, 4, axis=1)), -128, 127)
    np.testing.assert_array_equal(run(net.network, {"x": x, "s": scales})["y"], expected)
