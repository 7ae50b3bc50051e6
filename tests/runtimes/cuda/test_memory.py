"""Owners free their memory once, and arrays over pinned memory stay valid."""

from __future__ import annotations

import numpy as np
import pytest
from mock_cuda import Fault, MockDriver

from llmc.errors import LlmcError
from llmc.runtimes.cuda.memory import DeviceArray, PinnedArray


def test_a_device_array_is_freed_once() -> None:
    driver = MockDriver()
    array = DeviceArray(driver, (3, 5), itemsize=2)
    assert array.nbytes == 30 and driver.live == {"device": 1} and driver.used == 30
    address = array.address
    array.free()
    array.free()
    assert driver.live == {}
    with pytest.raises(AssertionError, match="has been freed"):
        array.address  # noqa: B018
    with pytest.raises(Fault, match="freed twice"):
        driver.free(address)


def test_an_array_without_elements_takes_no_memory() -> None:
    driver = MockDriver()
    array = DeviceArray(driver, (0, 5), itemsize=2)
    array.free()
    assert array.nbytes == 0 and driver.live == {}
    assert PinnedArray(driver, (0, 4), np.float32).array.shape == (0, 4)


def test_pinned_memory_lives_as_long_as_arrays_over_it() -> None:
    driver = MockDriver()
    pinned = PinnedArray(driver, (2, 3), np.float32)
    pinned.array[:] = 7
    view = pinned.array[1:]
    pinned.free()
    pinned.free()
    assert driver.live == {"pinned": 1} and view.tolist() == [[7, 7, 7]]
    del view
    assert driver.live == {}
    with pytest.raises(AssertionError, match="has been freed"):
        pinned.array  # noqa: B018


def test_a_round_trip() -> None:
    driver = MockDriver()
    stream = driver.create_stream()
    there, back = PinnedArray(driver, (4,), np.int64), PinnedArray(driver, (4,), np.int64)
    array = DeviceArray(driver, (4,), itemsize=8)
    there.array[:] = range(4)
    driver.copy_to_device(array.address, there.address, array.nbytes, stream)
    driver.copy_to_host(back.address, array.address, array.nbytes, stream)
    assert (back.array == -1).all()  # not yet
    driver.synchronize(stream)
    assert back.array.tolist() == [0, 1, 2, 3]


def test_too_large_an_array() -> None:
    driver = MockDriver(memory=8_000_000_000)
    with pytest.raises(LlmcError, match=r"Mock GPU has no room for 9\.00 GB: 8\.00 GB of 8\.00 GB are free") as caught:
        DeviceArray(driver, (9, 1_000_000_000), itemsize=1)
    assert caught.value.code == "CUDA_MEMORY" and caught.value.hint and driver.live == {}
