"""The memory of caches: one array for each part, with all slots."""

from __future__ import annotations

import math
import mmap

import numpy as np

from ...artifact.manifest import CacheSpec

Cache = tuple[CacheSpec, list[np.ndarray]]
"""A cache and the arrays [slots, heads, length, width] of its parts."""

# The dtype of a cache in the manifest -> the dtype of the graph's inputs and outputs.
_DTYPES = {"fp32": np.float32, "int8": np.int8, "fp8": np.uint8}


def resized(spec: CacheSpec, old: list[np.ndarray], ends: np.ndarray) -> list[np.ndarray]:
    """Return the arrays of a cache for other slots.

    Args:
        old: the arrays so far; empty if there are none.
        ends: the positions of each new slot that are kept; 0 for slots that there were not.
    """
    # Unwritten positions must be finite, since they are multiplied by an attention weight of zero.
    shapes = [(len(ends), spec.heads, spec.length, part.width) for part in spec.parts]
    arrays = [_zeros(shape, _DTYPES[part.dtype]) for shape, part in zip(shapes, spec.parts, strict=True)]
    for new, array in zip(arrays, old, strict=bool(old)):
        for slot in np.flatnonzero(ends[: len(array)]):
            new[slot, :, : ends[slot]] = array[slot, :, : ends[slot]]
    return arrays


def _zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return zeros whose memory is taken page by page, when it is written.

    numpy asks Linux for pages of 2 MB, of which a short sequence fills little: each head of each slot would take one.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
