"""TensorRT's callbacks: its log, its progress, and the plan that it writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO, Any

from .build_log import BuildLog

# TensorRT nests phases; deeper ones last milliseconds.
_SHOWN_DEPTH = 3
_SECONDS_BETWEEN_REPORTS = 0.1


def make_logger(module: Any, log: BuildLog) -> Any:
    """Return a logger of the library that collects all messages."""

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()


def make_monitor(module: Any, watch: Callable[[str, int, int], None]) -> Any:
    """Return a progress monitor of the library.

    Args:
        watch: called with a phase, and how many of its steps are done of how many.
    """

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}
            self.next_report = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            depth = self.phases[parent][0] + 1 if parent in self.phases else 1
            self.phases[phase] = depth, steps
            self.report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self.report(phase, step + 1)
            return True

        def phase_finish(self, phase: str) -> None:
            self.phases.pop(phase, None)

        def report(self, phase: str, done: int) -> None:
            depth, steps = self.phases.get(phase, (_SHOWN_DEPTH + 1, 0))
            if depth <= _SHOWN_DEPTH and time.monotonic() >= self.next_report:
                watch(phase, done, steps)
                self.next_report = time.monotonic() + _SECONDS_BETWEEN_REPORTS

    return Monitor()


def make_writer(module: Any, file: IO[bytes]) -> Any:
    """Return a stream of the library that writes to a file. Its `error` is the exception that stopped it, or None."""

    class Writer(module.IStreamWriter):
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            # An exception must not pass through the library.
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
