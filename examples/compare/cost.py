"""What making a model takes: seconds, and the most memory of all processes that take part."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EVERY = 0.2  # seconds; reading all of /proc costs milliseconds


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of the largest resident set of the processes together."""

    seconds: float
    peak_bytes: int
    quiet: bool
    """Whether the machine did nothing else."""
    report: dict[str, Any] | None = None
    """What the compiler says itself."""

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        peak = max(self.peak_bytes, other.peak_bytes)
        return Cost(self.seconds + other.seconds, peak, self.quiet and other.quiet, other.report)


class Watch:
    """Times what is within, and looks at the processes that this one starts; `seconds` and `peak_bytes` afterwards."""

    def __enter__(self) -> Watch:
        self.seconds, self.peak_bytes = 0.0, 0
        self._start, self._over = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            # Of one process the system keeps the peak itself, so that what falls between two looks is seen, too.
            held = memory_below(os.getpid())
            peaks = [peak for _, peak in held]
            self.peak_bytes = max([self.peak_bytes, sum(now for now, _ in held), *peaks])


def memory_below(root: int) -> list[tuple[int, int]]:
    """Bytes of each process that comes from `root`, without it: the resident set now, and the largest so far."""
    parents, held = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        said = dict(line.split(":", 1) for line in lines)
        pid = int(folder.name)
        parents[pid] = int(said["PPid"])
        if "VmRSS" in said:  # a kernel's thread or a zombie has none
            held[pid] = int(said["VmRSS"].split()[0]) * 1024, int(said["VmHWM"].split()[0]) * 1024

    def is_below(pid: int) -> bool:
        while pid := parents.get(pid, 0):
            if pid == root:
                return True
        return False

    return [memory for pid, memory in held.items() if is_below(pid)]
