"""Derive int8 weights for another kernel's layout when a graph is opened.

The artifact stores the codes of each weight once, in one layout. Graphs whose kernel needs the transposed layout get it
from these codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .section import DerivedSpec

# Input channels that are transposed at once: each read covers whole cache lines, and the result stays in the cache.
_STRIPE = 64


def write_derived(folder: Path, specs: Sequence[DerivedSpec], path: Path, threads: int) -> None:
    """Derive the matrices of `specs` and write them to `path` at their offsets."""
    path.touch()

    def write(spec: DerivedSpec) -> None:
        with path.open("r+b") as file:
            file.seek(spec.offset)
            derive(folder, spec).tofile(file)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, specs))


def derive(folder: Path, spec: DerivedSpec) -> np.ndarray:
    """Derive the int8 matrix [input channels, output channels] of a spec.

    `spec.rows` are the output channels, `spec.columns` the input channels.
    """
    data = folder / spec.file
    if spec.scheme == "int8":
        return _from_bytes(_read(data, spec.codes_offset, (spec.rows, spec.columns)))
    groups = spec.columns // spec.group_size
    packed = _read(data, spec.codes_offset, (spec.rows, spec.columns // 2))
    zeros, multiples = np.full((groups, spec.rows), 8, np.int8), None
    if spec.zeros_offset is not None:
        pairs = _read(data, spec.zeros_offset, (spec.rows, (groups + 1) // 2))
        zeros = np.stack((pairs & 15, pairs >> 4), -1).reshape(spec.rows, -1)[:, :groups].T.astype(np.int8)
    if spec.multiples_offset is not None:
        multiples = _read(data, spec.multiples_offset, (spec.rows, groups)).view(np.int8).T.copy()
    return _from_nibbles(packed, spec.group_size, zeros, multiples)


def _from_bytes(codes: np.ndarray) -> np.ndarray:
    """Transpose codes [outputs, inputs] of zero point 128 to int8 [inputs, outputs]."""
    matrix = np.empty(codes.shape[::-1], np.uint8)
    for start in range(0, len(matrix), _STRIPE):
        np.bitwise_xor(codes[:, start : start + _STRIPE].T, 128, out=matrix[start : start + _STRIPE])
    return matrix.view(np.int8)


def _from_nibbles(packed: np.ndarray, group_size: int, zeros: np.ndarray, multiples: np.ndarray | None) -> np.ndarray:
    """Transpose 4-bit codes to int8 [inputs, outputs]: (code - zero) * multiple.

    Args:
        packed: [outputs, inputs / 2], two codes per byte, the first in the low half.
        zeros: zero points [groups, outputs].
        multiples: [groups, outputs], how many times its output channel's scale a group's scale is; None means 1.
    """
    outputs, half = len(packed), group_size // 2
    matrix = np.empty((packed.shape[1] // half, half, 2, outputs), np.int8)
    for group, values in enumerate(matrix):
        transposed = packed[:, group * half : (group + 1) * half].T.copy()
        np.bitwise_and(transposed, 15, out=values[:, 0].view(np.uint8))
        np.right_shift(transposed, 4, out=values[:, 1].view(np.uint8))
        np.subtract(values, zeros[group], out=values)
        if multiples is not None:
            np.multiply(values, multiples[group], out=values)
    return matrix.reshape(-1, outputs)


def _read(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read bytes of a file into memory.

    It is not mapped: the session maps the same pages, which would count twice.
    """
    return np.fromfile(path, np.uint8, int(np.prod(shape)), offset=offset).reshape(shape)
