"""How long the phases of a compilation took, and the most memory that the process had held by their end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..runtimes.memory import give_back_memory, peak_rss

Watch = Callable[[str, int, int], None]


class Phases:
    """`with phases("capture"): ...` measures what is done within and tells `watch` that it began."""

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
        give_back_memory()
