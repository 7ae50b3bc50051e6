"""Quantize and dequantize: by tensor, by channel and by block, with constant or computed scales."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .call import Call, along
from .dtypes import NUMPY, numpy_dtype, widen


def quantize(call: Call) -> np.ndarray:
    """Return x / scale, rounded half to even and saturated."""
    x = widen(call.input(0))
    scaled = x / _spread(call, 1, x)
    dtype = numpy_dtype(call.outputs[0])
    if dtype == NUMPY["FP8"]:
        return scaled  # rounded to float8 as a result, and not to an integer before
    info = ml_dtypes.iinfo(dtype)
    return np.clip(np.rint(scaled) + _zeros(call, x), float(info.min), float(info.max))


def dequantize(call: Call) -> np.ndarray:
    """Return (code - zero point) * scale."""
    codes = call.input(0).astype(np.float32)
    return (codes - _zeros(call, codes)) * _spread(call, 1, codes)


def _zeros(call: Call, x: np.ndarray) -> np.ndarray:
    return np.zeros((), np.float32) if call.optional(2) is None else _spread(call, 2, x)


def _spread(call: Call, index: int, x: np.ndarray) -> np.ndarray:
    """Return scales or zero points, shaped to broadcast with `x`: one, one per channel, or one per block."""
    given = call.input(index).astype(np.float32)
    if given.size == 1:
        return given.reshape(())
    if given.ndim == 1:
        axis = call.layer.axis
        if given.size != x.shape[axis]:
            raise ValueError(f"{given.size} scales of {x.shape[axis]} channels")
        return given.reshape(along(axis, x.ndim))
    if given.ndim != x.ndim:
        raise ValueError(f"scales {given.shape} of values {x.shape}")
    for axis, (blocks, length) in enumerate(zip(given.shape, x.shape, strict=True)):
        if length % blocks:
            raise ValueError(f"{blocks} blocks of {length} elements")
        given = np.repeat(given, length // blocks, axis=axis)
    return given
