"""Layers that combine elements along axes: reductions, softmax, norms and cumulative sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .call import Call, axes_of, integers
from .dtypes import is_float, widen


def reduce(call: Call) -> np.ndarray:
    """Reduce axes, floats in float32 and integers in their own dtype."""
    x, layer = widen(call.input(0)), call.layer
    name = layer.op.name
    if name not in _REDUCTIONS or (name == "AVG" and not is_float(x)):
        raise call.refuse(f"the reduction {name} of {x.dtype}")
    return _REDUCTIONS[name](x, axis=axes_of(layer.axes, x.ndim), keepdims=layer.keep_dims)


def softmax(call: Call) -> np.ndarray:
    """Return the softmax over an axis."""
    x = widen(call.input(0))
    return softmax_over(x, axes_of(call.layer.axes, x.ndim))


def softmax_over(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the softmax over axes; slices that are -inf throughout become NaN."""
    e = np.exp(x - x.max(axis=axes, keepdims=True))
    return e / e.sum(axis=axes, keepdims=True)


def normalization(call: Call) -> np.ndarray:
    """Return (x - mean) / sqrt(variance + epsilon) * scale + bias."""
    x, scale, bias, layer = widen(call.input(0)), widen(call.input(1)), widen(call.input(2)), call.layer
    if layer.num_groups != 1:
        raise call.refuse(f"a norm of {layer.num_groups} groups")
    axes = axes_of(layer.axes, x.ndim)
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    return centred / np.sqrt(variance + np.float32(layer.epsilon)) * scale + bias


def cumulative(call: Call) -> np.ndarray:
    """Return running sums, from either end, with or without the element itself."""
    x, layer, (axis,) = widen(call.input(0)), call.layer, integers(call.input(1))
    if layer.op.name != "SUM":
        raise call.refuse(f"the cumulative operation {layer.op.name}")
    if layer.reverse:
        x = np.flip(x, axis)
    total = np.cumsum(x, axis=axis, dtype=x.dtype)
    if layer.exclusive:
        total = total - x
    return np.flip(total, axis) if layer.reverse else total


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "SUM": lambda x, **over: np.sum(x, dtype=x.dtype, **over),
    "PROD": lambda x, **over: np.prod(x, dtype=x.dtype, **over),
    "MAX": np.max,
    "MIN": np.min,
    "AVG": np.mean,
}
