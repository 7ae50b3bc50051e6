"""Work is recorded, repeated, and given up cleanly."""

from __future__ import annotations

import numpy as np
import pytest
from mock_cuda import MockDriver

from llmc.errors import LlmcError
from llmc.runtimes.cuda.graphs import capture
from llmc.runtimes.cuda.memory import DeviceArray, PinnedArray


def test_recorded_work_reads_what_is_there_when_it_is_repeated() -> None:
    driver = MockDriver()
    stream = driver.create_stream()
    host, array = PinnedArray(driver, (1,), np.int64), DeviceArray(driver, (1,), itemsize=8)

    def work() -> None:
        driver.copy_to_device(array.address, host.address, 8, stream)

    host.array[:] = 1
    graph = capture(driver, stream, work)
    driver.synchronize(stream)
    assert driver.view("device", array.address, 8)[0] == 0xFF  # recording does nothing
    for value in (5, 6):
        host.array[:] = value
        graph.launch(stream)
        driver.synchronize(stream)
        assert driver.view("device", array.address, 8)[0] == value
    graph.free()
    graph.free()
    assert driver.live == {"stream": 1, "pinned": 1, "device": 1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_capture_that_is_given_up(error: type[BaseException]) -> None:
    driver = MockDriver()
    stream = driver.create_stream()

    def work() -> None:
        raise error

    with pytest.raises(error):
        capture(driver, stream, work)
    assert not driver.is_capturing(stream) and driver.live == {"stream": 1}


def test_a_call_that_can_not_be_captured() -> None:
    driver = MockDriver()
    stream = driver.create_stream()
    for forbidden in (lambda: driver.synchronize(stream), lambda: driver.allocate(8)):
        with pytest.raises(LlmcError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            capture(driver, stream, forbidden)
        assert not driver.is_capturing(stream)
    driver.captures_work = False
    with pytest.raises(LlmcError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        capture(driver, stream, lambda: None)
    driver.synchronize(stream)
    assert driver.live == {"stream": 1}
