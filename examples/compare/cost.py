"""Measure the time and memory of making a model.

The memory is the peak of all processes involved.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INTERVAL = 0.2  # seconds between samples; reading all of /proc takes milliseconds


@dataclass(frozen=True)
class Cost:
    """Time and peak memory of one or several steps.

    Attributes:
        seconds: wall-clock time.
        peak_bytes: largest sum of the processes' resident sets.
        quiet: True if the machine did nothing else.
        report: the compiler's own report, if it has one.
    """

    seconds: float
    peak_bytes: int
    quiet: bool
    report: dict[str, Any] | None = None

    def __add__(self, other: Cost) -> Cost:
        """Cost of one step after the other."""
        peak = max(self.peak_bytes, other.peak_bytes)
        return Cost(self.seconds + other.seconds, peak, self.quiet and other.quiet, other.report)


class Watch:
    """Measure the time and memory of a `with` block.

    Afterwards, `seconds` is its time, and `peak_bytes` is the peak memory of its child processes.
    """

    def __enter__(self) -> Watch:
        self.seconds, self.peak_bytes = 0.0, 0
        self._start, self._stop = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            # The system keeps the peak of each process, so a short peak of one process between samples counts, too.
            memory = memory_below(os.getpid())
            peaks = [peak for _, peak in memory]
            self.peak_bytes = max([self.peak_bytes, sum(now for now, _ in memory), *peaks])


def memory_below(root: int) -> list[tuple[int, int]]:
    """Resident sets of all descendants of the process `root`.

    Each entry is (bytes now, peak bytes so far).
    """
    parents, memory = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        status = dict(line.split(":", 1) for line in lines)
        pid = int(folder.name)
        parents[pid] = int(status["PPid"])
        if "VmRSS" in status:  # kernel threads and zombies have none
            memory[pid] = int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024

    def is_below(pid: int) -> bool:
        while pid := parents.get(pid, 0):
            if pid == root:
                return True
        return False

    return [sizes for pid, sizes in memory.items() if is_below(pid)]
