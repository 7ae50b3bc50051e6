"""Elementwise layers, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from interpreting import FLOAT8, Network, check_op, graph, interpret, node, numbers, run_in_onnxruntime
from onnx import TensorProto

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

X = numbers(3, 5, 8)
NEAR_ZERO = numbers(3, 5, 8, low=-0.95, high=0.95)
POSITIVE = numbers(3, 5, 8, low=0.1)
INTEGERS = np.array([[7, -7, 8, -8], [1, -1, 0, 3]])
DIVISORS = np.array([[2, 2, -3, -3], [5, 5, 5, -2]])
MASK = X > 0


@pytest.mark.parametrize("kind", "Neg Exp Erf Floor Ceil Abs Sign Reciprocal Sin Cos Tan Sinh Cosh Atan Asinh".split())
def test_unary(kind: str) -> None:
    check_op(node(kind, "x"), {"x": X}, dtypes=["fp32", "bf16"] if kind == "Erf" else ["fp32", "fp16", "bf16"])


@pytest.mark.parametrize("kind", "Sqrt Log Acosh".split())
def test_unary_of_positive_numbers(kind: str) -> None:
    check_op(node(kind, "x"), {"x": POSITIVE + (kind == "Acosh")})


@pytest.mark.parametrize("kind", "Asin Acos Atanh".split())
def test_unary_of_small_numbers(kind: str) -> None:
    check_op(node(kind, "x"), {"x": NEAR_ZERO})


def test_round_takes_ties_to_even() -> None:
    check_op(node("Round", "x"), {"x": np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4], np.float32)})


@pytest.mark.parametrize("kind", ["Neg", "Abs", "Sign"])
def test_unary_of_integers(kind: str) -> None:
    check_op(node(kind, "x"), {"x": INTEGERS}, dtypes=["fp32"])


def test_predicates_and_logic() -> None:
    special = np.array([0, np.inf, -np.inf, np.nan], np.float32)
    nodes = [node("IsInf", "x", "a"), node("IsNaN", "x", "b"), node("Not", "b", "c")]
    check_op(nodes, {"x": special}, outputs="a b c", dtypes=["fp32"])
    for kind in ("And", "Or", "Xor"):
        check_op(node(kind, "m n"), {"m": MASK, "n": NEAR_ZERO > 0}, dtypes=["fp32"])


@pytest.mark.parametrize("kind", "Add Sub Mul Div Max Min".split())
def test_binary(kind: str) -> None:
    check_op(node(kind, "x c"), {"x": X}, {"c": numbers(5, 1, seed=1)})


def test_pow() -> None:
    check_op(node("Pow", "x e"), {"x": POSITIVE, "e": X})


@pytest.mark.parametrize("kind", "Less LessOrEqual Greater GreaterOrEqual Equal".split())
def test_comparisons(kind: str) -> None:
    check_op(node(kind, "x c"), {"x": np.round(X), "c": np.round(numbers(3, 5, 8, seed=1))})
    check_op(node(kind, "x c"), {"x": INTEGERS}, {"c": DIVISORS}, dtypes=["fp32"])


@pytest.mark.parametrize("kind", "Add Sub Mul Div Mod Max Min".split())
def test_binary_of_integers(kind: str) -> None:
    """Quotients are rounded towards zero; ONNX's remainder has the divisor's sign."""
    check_op(node(kind, "x d"), {"x": INTEGERS, "d": DIVISORS}, dtypes=["fp32"])


def test_remainder_of_floats() -> None:
    check_op(node("Mod", "x c", fmod=1), {"x": X, "c": np.full_like(X, 0.75)}, dtypes=["fp32"])


def test_floor_division() -> None:
    net = Network()
    a, b = INTEGERS.astype(np.int32), DIVISORS.astype(np.int32)
    operation = net.library.ElementWiseOperation.FLOOR_DIV
    net.output(net.network.add_elementwise(net.input("a", a), net.input("b", b), operation).get_output(0))
    np.testing.assert_array_equal(run(net.network, {"a": a, "b": b})["y"], a // b)
    net = Network()
    net.output(net.network.add_elementwise(net.input("a", X), net.input("b", POSITIVE), operation).get_output(0))
    np.testing.assert_array_equal(run(net.network, {"a": X, "b": POSITIVE})["y"], np.floor(X / POSITIVE))


@pytest.mark.parametrize(
    ("kind", "attributes", "roundings"),
    [
        ("Relu", {}, 1),
        ("Sigmoid", {}, 1),
        ("Tanh", {}, 1),
        ("LeakyRelu", {"alpha": 0.1}, 1),
        ("Elu", {"alpha": 0.5}, 1),
        ("Selu", {"alpha": 1.5, "gamma": 1.1}, 1),
        ("Softsign", {}, 1),
        ("Softplus", {}, 1),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, 1),
        ("ThresholdedRelu", {"alpha": 0.5}, 1),
        ("Gelu", {}, 2),
        ("Gelu", {"approximate": "tanh"}, 2),
        ("Mish", {}, 4),
        ("HardSwish", {}, 3),
        ("Swish", {"alpha": 1.5}, 4),
    ],
)
def test_activations(kind: str, attributes: dict[str, object], roundings: int) -> None:
    dtypes = ["fp32"]
    if kind in ("Relu", "Sigmoid", "Tanh"):  # ONNX Runtime has no fp16 kernels of the others
        dtypes.append("fp16")
    if kind not in ("Mish", "HardSwish"):  # TensorRT's parser refuses these
        dtypes.append("bf16")
    check_op(node(kind, "x", **attributes), {"x": X}, dtypes=dtypes, roundings=roundings)


def test_clip() -> None:
    check_op(node("Clip", "x low high"), {"x": X}, {"low": np.float32(-1)[...], "high": np.float32(1.5)[...]})
    check_op(node("Clip", "x low"), {"x": X}, {"low": np.float32(-1)[...]})


def test_select_broadcasts() -> None:
    check_op(node("Where", "m x c"), {"m": MASK[:, :, :1], "x": X}, {"c": np.float32(-5)[...]})


# Casts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT])
def test_cast_from_floats(to: int) -> None:
    """Fractions are dropped, and everything but 0 is true."""
    values = np.append(X.reshape(-1), [0, -0.5, 0.5, 1000]).astype(np.float32)
    check_op(node("Cast", "x", to=to), {"x": values}, dtypes=["fp32", "fp16"])


def test_cast_between_floats_rounds_to_even() -> None:
    values = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1e6], np.float32)
    half = [node("Cast", "x", "h", to=TensorProto.FLOAT16), node("Cast", "h", to=TensorProto.FLOAT)]
    check_op(half, {"x": values}, dtypes=["fp32"])
    brain = [node("Cast", "x", "h", to=TensorProto.BFLOAT16), node("Cast", "h", to=TensorProto.FLOAT)]
    check_op(brain, {"x": values}, dtypes=["fp32"])


def test_cast_to_float8_saturates() -> None:
    values = np.array([0, 1.06, -17, 447, 448, 470, 1e5, -1e5, np.nan, 2.0**-9, 2.0**-11], np.float32)
    nodes = [node("Cast", "x", "q", to=TensorProto.FLOAT8E4M3FN), node("Cast", "q", to=TensorProto.FLOAT)]
    check_op(nodes, {"x": values}, dtypes=["fp32"])
    model = graph(nodes[:1], {"x": values}, {}, ["q"])
    assert interpret(model, {"x": values})["q"].dtype == FLOAT8


def test_cast_from_integers() -> None:
    for to in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.INT32):
        check_op(node("Cast", "x", to=to), {"x": INTEGERS}, dtypes=["fp32"])
    check_op(node("Cast", "x", to=TensorProto.FLOAT16), {"x": MASK}, dtypes=["fp32"])
    for small in (INTEGERS.astype(np.int8), INTEGERS.astype(np.uint8)):
        check_op(node("Cast", "x", to=TensorProto.FLOAT), {"x": small}, dtypes=["fp32"])


def test_cast_to_integers_saturates() -> None:
    """C leaves it undefined, GPUs saturate."""
    values = np.array([3e9, -3e9, np.inf, -np.inf, np.nan, 2.0**31], np.float32)
    for to, dtype in ((TensorProto.INT32, np.int32), (TensorProto.INT64, np.int64)):
        y = interpret(graph([node("Cast", "x", to=to)], {"x": values}, {}, ["y"]), {"x": values})["y"]
        info = np.iinfo(dtype)
        expected = [min(max(v, info.min), info.max) for v in (3 * 10**9, -3 * 10**9)]
        assert y.tolist() == [*expected, info.max, info.min, 0, min(2**31, info.max)]


def test_identity() -> None:
    check_op([node("Identity", "x", "a"), node("Identity", "a")], {"x": X})


def test_onnxruntime_is_what_is_compared_with() -> None:
    """The helper compares two different programs."""
    model = graph([node("Neg", "x")], {"x": X}, {}, ["y"])
    np.testing.assert_array_equal(run_in_onnxruntime(model, {"x": X})["y"], -X)
