"""Owners of memory on a device and of pinned memory."""

from __future__ import annotations

import ctypes
import math
import weakref

import numpy as np

from .driver import Driver


class DeviceArray:
    """An array in device memory.

    Args:
        itemsize: bytes of an element, whose dtype numpy may not have.
    """

    def __init__(self, driver: Driver, shape: tuple[int, ...], itemsize: int) -> None:
        self.shape = shape
        self.nbytes = math.prod(shape) * itemsize
        self._driver = driver
        self._address: int | None = driver.allocate(self.nbytes) if self.nbytes else 0

    @property
    def address(self) -> int:
        assert self._address is not None, "the array has been freed"
        return self._address

    def free(self) -> None:
        """Free the memory, after all work that uses it. A second call does nothing."""
        address, self._address = self._address, None
        if address:
            self._driver.free(address)


class PinnedArray:
    """A numpy array in pinned memory.

    The memory is freed when neither this object nor an array over it is in use, so that arrays that were handed out
    never point to freed memory.
    """

    def __init__(self, driver: Driver, shape: tuple[int, ...], dtype: type) -> None:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = driver.allocate_pinned(max(1, nbytes))
        memory = (ctypes.c_ubyte * nbytes).from_address(address)
        # At the end of the process, the driver frees what is left.
        weakref.finalize(memory, driver.free_pinned, address).atexit = False
        self._address = address
        self._array: np.ndarray | None = np.frombuffer(memoryview(memory), dtype).reshape(shape)

    @property
    def array(self) -> np.ndarray:
        assert self._array is not None, "the array has been freed"
        return self._array

    @property
    def address(self) -> int:
        assert self._array is not None, "the array has been freed"
        return self._address

    def free(self) -> None:
        """Give the memory up; no copy may use it any more. A second call does nothing."""
        self._array = None
