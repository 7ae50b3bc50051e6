"""The same integer weights in another kernel's layout, made when a graph is opened and not stored twice."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...artifact.manifest import DerivedSpec

# Columns that are turned together: rows of so many bytes are read whole, and what is made of them stays in the cache.
_STRIPE = 64


def write_derived(folder: Path, specs: Sequence[DerivedSpec], path: Path, threads: int) -> None:
    """Make the matrices that the specs describe and write them where the graph looks for them."""
    path.touch()

    def write(spec: DerivedSpec) -> None:
        with path.open("r+b") as file:
            file.seek(spec.offset)
            derive(folder, spec).tofile(file)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, specs))


def derive(folder: Path, spec: DerivedSpec) -> np.ndarray:
    """The int8 matrix [columns, rows] that a spec describes."""
    data = folder / spec.file
    if spec.scheme == "int8":
        return _of_bytes(_slice(data, spec.codes_offset, (spec.rows, spec.columns)))
    groups = spec.columns // spec.group_size
    packed = _slice(data, spec.codes_offset, (spec.rows, spec.columns // 2))
    zeros, multiples = np.full((groups, spec.rows), 8, np.int8), None
    if spec.zeros_offset is not None:
        pairs = _slice(data, spec.zeros_offset, (spec.rows, (groups + 1) // 2))
        zeros = np.stack((pairs & 15, pairs >> 4), -1).reshape(spec.rows, -1)[:, :groups].T.astype(np.int8)
    if spec.multiples_offset is not None:
        multiples = _slice(data, spec.multiples_offset, (spec.rows, groups)).view(np.int8).T.copy()
    return _of_nibbles(packed, spec.group_size, zeros, multiples)


def _of_bytes(codes: np.ndarray) -> np.ndarray:
    """Codes around 128 [rows, columns] as int8 [columns, rows]."""
    matrix = np.empty(codes.shape[::-1], np.uint8)
    for start in range(0, len(matrix), _STRIPE):
        np.bitwise_xor(codes[:, start : start + _STRIPE].T, 128, out=matrix[start : start + _STRIPE])
    return matrix.view(np.int8)


def _of_nibbles(packed: np.ndarray, group_size: int, zeros: np.ndarray, multiples: np.ndarray | None) -> np.ndarray:
    """Codes 0..15, two a byte and the low one first, as int8 [columns, rows]: around zero, times their multiple.

    Zero points and multiples, [groups, rows], belong to a group.
    """
    rows, half = len(packed), group_size // 2
    matrix = np.empty((packed.shape[1] // half, half, 2, rows), np.int8)
    for group, made in enumerate(matrix):
        turned = packed[:, group * half : (group + 1) * half].T.copy()
        np.bitwise_and(turned, 15, out=made[:, 0].view(np.uint8))
        np.right_shift(turned, 4, out=made[:, 1].view(np.uint8))
        np.subtract(made, zeros[group], out=made)
        if multiples is not None:
            np.multiply(made, multiples[group], out=made)
    return matrix.reshape(-1, rows)


def _slice(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of the file: read, not mapped, for the session maps it already and pages would count twice."""
    return np.fromfile(path, np.uint8, int(np.prod(shape)), offset=offset).reshape(shape)
