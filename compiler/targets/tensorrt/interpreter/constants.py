"""Read the constants of an ONNX graph that TensorRT does not return as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_DTYPES: dict[int, np.dtype[Any]] = {
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    TensorProto.INT4: np.dtype(ml_dtypes.int4),
}


def collect_constants(path: Path) -> dict[str, np.ndarray]:
    """Return the bf16, fp8 and int4 initializers of an ONNX file by name, for `run`.

    External data must be in the file's folder. bf16 and fp8 values are mapped and not copied.
    """
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name: _array(tensor, path.parent) for tensor in graph.initializer if tensor.data_type in _DTYPES}


def _array(tensor: TensorProto, folder: Path) -> np.ndarray:
    dtype, shape = _DTYPES[tensor.data_type], tuple(tensor.dims)
    if tensor.data_location != TensorProto.EXTERNAL and not tensor.HasField("raw_data"):
        return numpy_helper.to_array(tensor).astype(dtype)
    stored = _external(tensor, folder) if tensor.data_location == TensorProto.EXTERNAL else tensor.raw_data
    data = np.frombuffer(stored, np.uint8)
    if tensor.data_type == TensorProto.INT4:
        return unpacked(data, shape)
    return data.view(dtype).reshape(shape)


def unpacked(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the signed 4-bit codes in bytes, of which each has two, the low nibble first."""
    nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))]
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4).reshape(shape)


def _external(tensor: TensorProto, folder: Path) -> np.ndarray:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(entries.get("offset", 0)), entries.get("length")
    path = folder / entries["location"]
    count = int(length) if length is not None else path.stat().st_size - offset
    return np.memmap(path, np.uint8, "r", offset, (count,)) if count else np.empty(0, np.uint8)
