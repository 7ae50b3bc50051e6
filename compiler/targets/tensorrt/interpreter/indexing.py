"""Layers that read or write elements by indices."""

from __future__ import annotations

import numpy as np

from .call import Call, along, integers
from .dtypes import numpy_dtype


def gather(call: Call) -> np.ndarray:
    """Read slices along an axis, elements along an axis, or elements by indices of several dimensions.

    Negative indices count from the end; others outside are an error.
    """
    data, indices, mode = call.input(0), call.input(1).astype(np.int64), call.layer.mode.name
    if mode == "ELEMENT":
        return data[_positions(data, indices, call.layer.axis)]
    batches = call.layer.num_elementwise_dims
    if mode == "ND":
        return data[(*_grid(indices.shape[:batches], indices.ndim - 1), *np.moveaxis(indices, -1, 0))]
    if batches == 0:
        return np.take(data, indices, axis=call.layer.axis)
    return np.stack([np.take(d, i, axis=call.layer.axis - 1) for d, i in zip(data, indices, strict=True)])


def scatter(call: Call) -> np.ndarray:
    """Write updates to a copy; of equal indices, the last one counts."""
    data, indices, updates = call.input(0).copy(), call.input(1).astype(np.int64), call.input(2)
    if call.layer.mode.name == "ELEMENT":
        data[_positions(data, indices, call.layer.axis)] = updates
    else:
        data[tuple(np.moveaxis(indices, -1, 0))] = updates
    return data


def one_hot(call: Call) -> np.ndarray:
    """Add a dimension with one value at each index, and another one elsewhere."""
    indices, (off, on), (depth,) = call.input(0), call.input(1), integers(call.input(2))
    axis = call.layer.axis % (indices.ndim + 1)
    classes = np.arange(depth).reshape(along(axis, indices.ndim + 1))
    return np.where(np.expand_dims(indices, axis) == classes, on, off)


def non_zero(call: Call) -> np.ndarray:
    """Return the indices of elements that are not 0, [rank, count]."""
    return np.stack(np.nonzero(call.input(0)))


def top_k(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Return the k first values in order, and their indices; of equal values, the earlier one comes first."""
    x, layer, k = call.input(0), call.layer, call.optional(1)
    count = layer.k if k is None else integers(k)[0]
    axis = int(layer.axes).bit_length() - 1
    if layer.axes != 1 << axis:
        raise call.refuse("top-k over several axes")
    if layer.op.name == "MIN":
        order = np.argsort(x, axis=axis, kind="stable")
    else:
        backwards = np.flip(np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)
        order = x.shape[axis] - 1 - backwards
    chosen = np.take(order, np.arange(count), axis=axis)
    return np.take_along_axis(x, chosen, axis=axis), chosen.astype(numpy_dtype(call.outputs[1]))


def _positions(data: np.ndarray, indices: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """Return an index of each dimension: `indices` for one axis, and its own position for the others."""
    grid = _grid(indices.shape, indices.ndim)
    return (*grid[:axis], indices, *grid[axis + 1 :])


def _grid(shape: tuple[int, ...], rank: int) -> list[np.ndarray]:
    """Return the positions of each of the first dimensions, shaped to broadcast over `rank` dimensions."""
    return [np.arange(n).reshape(along(axis, rank)) for axis, n in enumerate(shape)]
