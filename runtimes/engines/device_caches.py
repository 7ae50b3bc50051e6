"""KV caches in device memory, which a graph reads and writes in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..artifact.manifest import CacheSpec
from ..cuda.driver import Driver
from ..cuda.memory import DeviceArray
from .onnx_names import past_name, present_name

_ITEM_BYTES = 2  # fp16 and bf16


@dataclass(frozen=True)
class CacheTensor:
    """A tensor of a cache.

    Attributes:
        past: the name of the input.
        present: the name of the output, which is in the same memory.
        shape: of one slot, [heads, length, width].
        stride: bytes from a slot to the next.
    """

    past: str
    present: str
    shape: tuple[int, int, int]
    stride: int

    @property
    def row(self) -> int:
        """Bytes of one position of one head."""
        return self.shape[2] * _ITEM_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of one slot."""
        return self.shape[0] * self.shape[1] * self.row


class DeviceCaches:
    """All cache tensors of all slots.

    Args:
        alignment: every slot begins at a multiple of this many bytes.

    Attributes:
        tensors: in the order of the graph's inputs.
        contiguous: True if adjacent slots have no gap between them, so that one call can serve them.
    """

    def __init__(self, driver: Driver, stream: int, specs: Sequence[CacheSpec], alignment: int) -> None:
        self._driver, self._stream = driver, stream
        self.tensors = [
            _tensor(i, role, (spec.heads, spec.length, width), alignment)
            for i, spec in enumerate(specs)
            for role, width in (("key", spec.key_dim), ("value", spec.value_dim))
        ]
        self.contiguous = all(tensor.stride == tensor.nbytes for tensor in self.tensors)
        self._arrays: list[DeviceArray] = []
        self._slots = 0

    def open(self, count: int) -> None:
        """Make room for `count` slots; those that were there keep their content. If it fails, nothing has changed."""
        arrays: list[DeviceArray] = []
        try:
            for tensor in self.tensors:
                arrays.append(DeviceArray(self._driver, (count, tensor.stride), 1))
            self._fill(arrays, count)
        except BaseException:
            _free(arrays)
            raise
        old, self._arrays, self._slots = self._arrays, arrays, count
        _free(old)

    def address(self, index: int, slot: int) -> int:
        """Return where a slot of a tensor begins."""
        return self._arrays[index].address + slot * self.tensors[index].stride

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a slot to another one."""
        if source == target or not length:
            return
        for index, tensor in enumerate(self.tensors):
            heads, positions, _ = tensor.shape
            at = self.address(index, target), self.address(index, source)
            self._driver.copy_rows(
                *at, min(length, positions) * tensor.row, positions * tensor.row, heads, self._stream
            )

    def free(self) -> None:
        """Free the memory. A second call does nothing."""
        _free(self._arrays)
        self._arrays, self._slots = [], 0

    def _fill(self, arrays: list[DeviceArray], count: int) -> None:
        kept = min(count, self._slots)
        for index, (array, tensor) in enumerate(zip(arrays, self.tensors, strict=True)):
            if kept:
                self._driver.copy_on_device(array.address, self.address(index, 0), kept * tensor.stride, self._stream)
            if count > kept:
                # Unwritten positions must be finite, since they are multiplied by an attention weight of zero.
                rest = kept * tensor.stride
                self._driver.fill(array.address + rest, 0, array.nbytes - rest, self._stream)
        self._driver.synchronize(self._stream)


def _tensor(index: int, role: str, shape: tuple[int, int, int], alignment: int) -> CacheTensor:
    nbytes = shape[0] * shape[1] * shape[2] * _ITEM_BYTES
    stride = -(-nbytes // alignment) * alignment
    return CacheTensor(past_name(index, role), present_name(index, role), shape, stride)


def _free(arrays: Sequence[DeviceArray]) -> None:
    for array in arrays:
        array.free()
