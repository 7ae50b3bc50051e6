"""Time and peak memory of the phases of a compilation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..runtimes.memory import peak_rss, trim_memory

Watch = Callable[[str, int, int], None]


class Phases:
    """Measure phases: `with phases("capture"): ...`.

    Args:
        watch: called with the name of a phase when it begins, and 0 of 0 steps.

    Attributes:
        seconds: the time of each phase, by name.
        peak: the peak memory of the process at the end of each phase, in bytes, by name.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.watch(name, 0, 0)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
        self.peak[name] = max(self.peak.get(name, 0), peak_rss() or 0)
        trim_memory()
