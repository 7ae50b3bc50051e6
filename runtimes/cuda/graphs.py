"""Record work once and repeat it with one call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ...errors import LlmcError
from .driver import Driver


class Graph:
    """Recorded work; it uses the addresses that the work was recorded with."""

    def __init__(self, driver: Driver, executable: int) -> None:
        self._driver = driver
        self._executable: int | None = executable

    def launch(self, stream: int) -> None:
        """Put the work on a stream."""
        assert self._executable is not None, "the graph has been freed"
        self._driver.launch_graph(self._executable, stream)

    def free(self) -> None:
        """Free the graph. A second call does nothing."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._driver.destroy_executable(executable)


def capture(driver: Driver, stream: int, work: Callable[[], object]) -> Graph:
    """Record the work that a function puts on a stream; nothing of it is done now.

    Raises:
        LlmcError: CUDA_FAILED if the work can't be recorded. The stream is usable again, after any exception.
    """
    driver.begin_capture(stream)
    try:
        work()
    except BaseException:
        with suppress(LlmcError):
            driver.destroy_graph(driver.end_capture(stream))
        raise
    graph = driver.end_capture(stream)
    try:
        return Graph(driver, driver.instantiate(graph))
    finally:
        driver.destroy_graph(graph)
