"""The same integer weights in another kernel's layout, made when a graph is opened and not stored twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .manifest import DerivedSpec

# Two codes 0..15 of a byte, low nibble first, as two int8 numbers -8..7 side by side.
_PAIRS = np.array([(byte & 15, byte >> 4) for byte in range(256)], np.int8) - np.int8(8)
_PAIRS_AS_WORDS = np.ascontiguousarray(_PAIRS).view(np.int16).ravel()


def derive(folder: Path, spec: DerivedSpec) -> np.ndarray:
    """The int8 matrix [columns, rows] that a spec describes."""
    data = folder / spec.file
    if spec.scheme == "int8":
        codes = _slice(data, spec.codes_offset, (spec.rows, spec.columns))
        matrix = (codes ^ np.uint8(128)).view(np.int8)
    else:
        packed = _slice(data, spec.codes_offset, (spec.rows, spec.columns // 2))
        groups = spec.columns // spec.group_size
        matrix = _PAIRS_AS_WORDS[packed].view(np.int8).reshape(spec.rows, groups, spec.group_size)
        if spec.steps_offset is not None:
            steps = _slice(data, spec.steps_offset, (spec.rows, groups * 4)).view(np.float32)
            scales = _slice(data, spec.scales_offset, (spec.rows, 4)).view(np.float32)
            matrix *= np.rint(steps / scales).astype(np.int8)[:, :, None]
        matrix = matrix.reshape(spec.rows, spec.columns)
    return np.ascontiguousarray(matrix.T)


def _slice(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of the file: read, not mapped, for the session maps it already and pages would count twice."""
    return np.fromfile(path, np.uint8, int(np.prod(shape)), offset=offset).reshape(shape)
