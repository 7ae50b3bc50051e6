"""Layers that compute each element on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .call import Call
from .dtypes import is_float, widen

Function = Callable[[np.ndarray], np.ndarray]
Activation = Callable[[np.ndarray, float, float], np.ndarray]


def elementwise(call: Call) -> np.ndarray:
    """Apply a binary operation; integers stay integers."""
    return _BINARY[call.layer.op.name](widen(call.input(0)), widen(call.input(1)))


def unary(call: Call) -> np.ndarray:
    """Apply a function of one number."""
    return _UNARY[call.layer.op.name](widen(call.input(0)))


def activation(call: Call) -> np.ndarray:
    """Apply an activation function, which may have two parameters."""
    layer = call.layer
    return _ACTIVATIONS[layer.type.name](widen(call.input(0)), layer.alpha, layer.beta)


def same(call: Call) -> np.ndarray:
    """Return the input, which is then rounded to the dtype of the output: an identity or a cast."""
    return call.input(0)


def select(call: Call) -> np.ndarray:
    """Take elements of the second input where the first is true, and of the third elsewhere."""
    return np.where(call.input(0), call.input(1), call.input(2))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide; quotients of integers are rounded towards zero."""
    if is_float(a):
        return a / b
    down = a // b
    return down + ((a % b != 0) & ((a < 0) != (b < 0)))


def _floor_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.floor(a / b) if is_float(a) else a // b


def _erf(x: np.ndarray) -> np.ndarray:
    return torch.erf(torch.from_numpy(np.array(x))).numpy()


def _clip(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return np.maximum(x.dtype.type(alpha), np.minimum(x.dtype.type(beta), x))


def _elu(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return np.where(x >= 0, x, alpha * np.expm1(x))


def _selu(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return beta * _elu(x, alpha, beta)


def _gelu_tanh(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))


def _gelu_erf(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return 0.5 * x * (1 + _erf(x * np.float32(np.sqrt(0.5))))


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "SUB": np.subtract,
    "DIV": _divide,
    "POW": np.power,
    "FLOOR_DIV": _floor_divide,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
}

_UNARY: dict[str, Function] = {
    "EXP": np.exp,
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RECIP": lambda x: 1 / x,
    "ABS": np.abs,
    "NEG": np.negative,
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "SINH": np.sinh,
    "COSH": np.cosh,
    "ASIN": np.arcsin,
    "ACOS": np.arccos,
    "ATAN": np.arctan,
    "ASINH": np.arcsinh,
    "ACOSH": np.arccosh,
    "ATANH": np.arctanh,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ERF": _erf,
    "NOT": np.logical_not,
    "SIGN": np.sign,
    "ROUND": np.rint,
    "ISINF": np.isinf,
    "ISNAN": np.isnan,
}

_ACTIVATIONS: dict[str, Activation] = {
    "RELU": lambda x, alpha, beta: np.maximum(x, x.dtype.type(0)),
    "SIGMOID": lambda x, alpha, beta: 1 / (1 + np.exp(-x)),
    "TANH": lambda x, alpha, beta: np.tanh(x),
    "LEAKY_RELU": lambda x, alpha, beta: np.where(x >= 0, x, alpha * x),
    "ELU": _elu,
    "SELU": _selu,
    "SOFTSIGN": lambda x, alpha, beta: x / (1 + np.abs(x)),
    "SOFTPLUS": lambda x, alpha, beta: alpha * np.logaddexp(np.float32(0), beta * x),
    "CLIP": _clip,
    "HARD_SIGMOID": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "SCALED_TANH": lambda x, alpha, beta: alpha * np.tanh(beta * x),
    "THRESHOLDED_RELU": lambda x, alpha, beta: np.where(x > alpha, x, x.dtype.type(0)),
    "GELU_ERF": _gelu_erf,
    "GELU_TANH": _gelu_tanh,
}
