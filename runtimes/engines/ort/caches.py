"""KV caches of all slots in numpy arrays, one for each part, which graphs on a CPU read and write in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...artifact.manifest import CacheSpec
from ..onnx_names import past_name, present_name

# The dtype of a cache in the manifest -> the dtype of the graph's inputs and outputs.
DTYPES: Mapping[str, Any] = {"fp32": np.float32, "int8": np.int8, "fp8": np.uint8}


class BoundTensor(NamedTuple):
    """A part of a cache of some slots, as a session binds it.

    Attributes:
        past: the name of the graph's input.
        present: the name of the graph's output, which is in the same memory.
        element_type: numpy's, or the number of ONNX's.
        shape: [slots, heads, length, width].
    """

    past: str
    present: str
    element_type: Any
    shape: tuple[int, ...]
    address: int


class HostCaches:
    """The caches of an engine in the memory of the host.

    Args:
        dtypes: by the manifest's dtype of a part, numpy's.

    Attributes:
        arrays: for each cache those of its parts, [slots, heads, length, width].
    """

    def __init__(self, specs: Sequence[CacheSpec], dtypes: Mapping[str, Any] = DTYPES) -> None:
        self._specs, self._dtypes = specs, dtypes
        self.arrays: list[list[np.ndarray]] = [[] for _ in specs]

    def open(self, kept: np.ndarray) -> None:
        """Make room for other slots.

        Args:
            kept: the positions of each new slot that keep their content; 0 for slots that there were not.
        """
        self.arrays = [
            resized(spec, arrays, kept, self._dtypes) for spec, arrays in zip(self._specs, self.arrays, strict=True)
        ]

    def bound(self, slot: int, batch: int) -> Iterator[BoundTensor]:
        """Yield the parts of adjacent slots."""
        for i, (spec, arrays) in enumerate(zip(self._specs, self.arrays, strict=True)):
            for array, part in zip(arrays, spec.parts, strict=True):
                memory = array[slot : slot + batch]
                names = past_name(i, part.role), present_name(i, part.role)
                yield BoundTensor(*names, array.dtype, memory.shape, memory.ctypes.data)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a slot to another one."""
        for arrays in self.arrays:
            for array in arrays:
                # A ring that is not full has a position's entries at its index, as a static cache.
                array[target, :, :length] = array[source, :, :length]

    def free(self) -> None:
        """Free the memory. A second call does nothing."""
        self.arrays = [[] for _ in self._specs]


def resized(
    spec: CacheSpec, old: list[np.ndarray], ends: np.ndarray, dtypes: Mapping[str, Any] = DTYPES
) -> list[np.ndarray]:
    """Return the arrays of a cache for other slots.

    Args:
        old: the arrays so far; empty if there are none.
        ends: the positions of each new slot that are kept; 0 for slots that there were not.
    """
    # Unwritten positions must be finite, since they are multiplied by an attention weight of zero.
    shapes = [(len(ends), spec.heads, spec.length, part.width) for part in spec.parts]
    arrays = [_zeros(shape, dtypes[part.dtype]) for shape, part in zip(shapes, spec.parts, strict=True)]
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
