"""Layers that move elements by position: shapes, transposes, slices and concatenations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .call import Call, along, integers


def shape(call: Call) -> np.ndarray:
    """Return the sizes of the input."""
    return np.array(call.input(0).shape, np.int64)


def shuffle(call: Call) -> np.ndarray:
    """Transpose, reshape and transpose again; each of the three may be left out."""
    x, layer = call.input(0), call.layer
    x = _transposed(x, layer.first_transpose)
    dynamic = call.optional(1)
    sizes = layer.reshape_dims if dynamic is None else integers(dynamic)
    # TensorRT returns None where there is no reshape, and () where it makes a scalar.
    if sizes is not None:
        x = x.reshape(_resolved(list(sizes), x, layer.zero_is_placeholder))
    return _transposed(x, layer.second_transpose)


def _transposed(x: np.ndarray, order: Iterable[int]) -> np.ndarray:
    """Transpose by the first entries of a permutation, which always has 8."""
    return x.transpose(tuple(order)[: x.ndim])


def _resolved(sizes: list[int], x: np.ndarray, zero_is_placeholder: bool) -> list[int]:
    return [x.shape[axis] if size == 0 and zero_is_placeholder else size for axis, size in enumerate(sizes)]


def squeeze(call: Call) -> np.ndarray:
    """Remove dimensions of size 1: the given ones or all."""
    axes = call.optional(1)
    return np.squeeze(call.input(0), None if axes is None else tuple(integers(axes)))


def unsqueeze(call: Call) -> np.ndarray:
    """Insert dimensions of size 1 at the given places of the result."""
    return np.expand_dims(call.input(0), tuple(integers(call.input(1))))


def concatenation(call: Call) -> np.ndarray:
    """Join the inputs along an axis."""
    return np.concatenate([call.input(i) for i in range(len(call.inputs))], axis=call.layer.axis)


# Slices -------------------------------------------------------------------------------------------------------------


def slice_(call: Call) -> np.ndarray:
    """Take `start + stride * i` along each axis; start, size, stride and axes are inputs or attributes."""
    x, layer = call.input(0), call.layer
    starts, sizes, strides = (
        _given(call, index, value) for index, value in enumerate((layer.start, layer.shape, layer.stride), 1)
    )
    axes = _given(call, 5, layer.axes) or range(x.ndim)
    mode = layer.mode.name
    outside = np.zeros((1,) * x.ndim, np.bool_)
    for axis, start, size, stride in zip(axes, starts, sizes, strides, strict=True):
        positions, length = start + stride * np.arange(size), x.shape[axis]
        if mode == "FILL":
            outside = outside | ((positions < 0) | (positions >= length)).reshape(along(axis, x.ndim))
        x = np.take(x, _WITHIN[mode](positions, length), axis=axis)
    if mode == "FILL":
        fill = call.optional(4)
        x = np.where(outside, x.dtype.type(0) if fill is None else fill, x)
    return x


def _given(call: Call, index: int, attribute: Iterable[int] | None) -> list[int]:
    """Return an input of integers, or the attribute that it replaces."""
    value = call.optional(index)
    if value is not None:
        return integers(value)
    return [] if attribute is None else list(attribute)


def _strict(positions: np.ndarray, length: int) -> np.ndarray:
    if positions.size and not (positions.min() >= 0 and positions.max() < length):
        raise IndexError(f"positions {positions.min()} to {positions.max()} of a dimension of {length}")
    return positions


def _clamped(positions: np.ndarray, length: int) -> np.ndarray:
    return np.clip(positions, 0, length - 1)


def _reflected(positions: np.ndarray, length: int) -> np.ndarray:
    """Reflect at the first and at the last element, without repeating them."""
    period = max(2 * (length - 1), 1)
    return length - 1 - np.abs(positions % period - (length - 1))


_WITHIN: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "STRICT_BOUNDS": _strict,
    "WRAP": lambda positions, length: positions % length,
    "CLAMP": _clamped,
    "FILL": _clamped,
    "REFLECT": _reflected,
}
"""By sample mode: the positions that are read, all inside the dimension."""
