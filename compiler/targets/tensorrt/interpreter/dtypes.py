"""The element types of TensorRT in numpy, and rounding to them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

NUMPY: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
    "INT4": np.dtype(ml_dtypes.int4),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""By the name of TensorRT's `DataType`."""

FLOAT8_MAX = 448.0
_FLOATS = {NUMPY[name] for name in ("FLOAT", "HALF", "BF16", "FP8")} | {np.dtype(np.float64)}


def numpy_dtype(tensor: Any) -> np.dtype[Any]:
    """Return the dtype of a tensor's values.

    Raises:
        NotImplementedError: numpy has no such dtype.
    """
    name = tensor.dtype.name
    if name not in NUMPY:
        raise NotImplementedError(f"Tensor {tensor.name} has dtype {name}, which the interpreter does not cover.")
    return NUMPY[name]


def is_float(x: np.ndarray) -> bool:
    """Return True for floats of any width."""
    return x.dtype in _FLOATS


def widen(x: np.ndarray) -> np.ndarray:
    """Convert floats and 4-bit integers to float32, in which layers compute; keep other integers and bools."""
    return x.astype(np.float32) if is_float(x) or x.dtype == NUMPY["INT4"] else x


def round_to(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Round values to a dtype.

    Floats are rounded half to even. Conversions to float8 and from floats to integers saturate; the latter drop the
    fraction first, and convert NaN to 0.
    """
    if x.dtype == dtype:
        return x
    if dtype == NUMPY["FP8"]:
        return np.clip(widen(x).astype(np.float32), -FLOAT8_MAX, FLOAT8_MAX).astype(dtype)
    if is_float(x) and dtype not in _FLOATS and dtype != np.bool_:
        return _saturated(widen(x), dtype)
    return x.astype(dtype)


def _saturated(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    info = ml_dtypes.iinfo(dtype)
    lowest, highest = int(info.min), int(info.max)
    # As a float, the largest integer of a wide dtype is rounded up, beyond the dtype. Such values are replaced.
    above, below = x >= float(highest), x <= float(lowest)
    inner = np.where(above | below | np.isnan(x), 0, np.trunc(x)).astype(np.int64)
    return np.where(above, highest, np.where(below, lowest, inner)).astype(np.int64).astype(dtype)
