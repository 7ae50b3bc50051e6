"""The mock driver sees each misuse that it is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mock_cuda import Fault, MockDriver

from llmc.errors import LlmcError

Misuse = Callable[[MockDriver, int, int, int], None]


def uses_after_free(driver: MockDriver, stream: int, memory: int, pinned: int) -> None:
    driver.free(memory)
    driver.fill(memory, 0, 8, stream)


def frees_what_a_copy_uses(driver: MockDriver, stream: int, memory: int, pinned: int) -> None:
    driver.copy_to_device(memory, pinned, 8, stream)
    driver.free_pinned(pinned)
    driver.synchronize(stream)


FAULTS: dict[str, Misuse] = {
    "freed": uses_after_free,
    "after it was freed": frees_what_a_copy_uses,
    "freed twice": lambda d, s, m, p: (d.free(m), d.free(m)),
    "not allocated": lambda d, s, m, p: d.free(m + 8),
    "out of the bounds": lambda d, s, m, p: d.copy_to_host(p, m + 60, 8, s),
    "pinned memory is used as device": lambda d, s, m, p: d.copy_on_device(m, p, 8, s),
    "overlaps": lambda d, s, m, p: d.copy_on_device(m, m + 4, 8, s),
    "rows overlap": lambda d, s, m, p: d.copy_rows(m, m + 32, 8, 4, 2, s),
    "no stream": lambda d, s, m, p: d.synchronize(77),
    "no executable": lambda d, s, m, p: d.launch_graph(77, s),
    "no device memory": lambda d, s, m, p: d.fill(4096, 0, 8, s),
}


@pytest.mark.parametrize("message", FAULTS)
def test_misuse_is_seen(message: str) -> None:
    driver = MockDriver()
    stream, memory, pinned = driver.create_stream(), driver.allocate(64), driver.allocate_pinned(64)
    with pytest.raises(Fault, match=message):
        FAULTS[message](driver, stream, memory, pinned)


def test_illegal_calls_of_captures() -> None:
    driver = MockDriver()
    stream = driver.create_stream()
    with pytest.raises(LlmcError, match="ILLEGAL_STATE"):
        driver.end_capture(stream)
    driver.begin_capture(stream)
    with pytest.raises(LlmcError, match="ILLEGAL_STATE"):
        driver.begin_capture(stream)
    for call in (lambda: driver.allocate(1), lambda: driver.synchronize(stream), lambda: driver.allocate_pinned(1)):
        with pytest.raises(LlmcError, match="UNSUPPORTED"):
            call()
    with pytest.raises(LlmcError, match="INVALIDATED"):
        driver.end_capture(stream)


def test_events_follow_the_work_before_them() -> None:
    driver = MockDriver()
    streams = driver.create_stream(), driver.create_stream()
    event, done = driver.create_event(), []
    driver.put(streams[0], lambda: done.append("first"))
    driver.record_event(event, streams[0])
    driver.wait_for_event(streams[1], event)
    driver.put(streams[1], lambda: done.append("second"))
    with pytest.raises(LlmcError, match="NOT_READY"):
        driver.elapsed_ms(event, event)
    driver.synchronize(streams[1])
    assert done == ["first", "second"] and driver.elapsed_ms(event, event) > 0
    driver.destroy_event(event)
    assert driver.live == {"stream": 2}
