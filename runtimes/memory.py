"""Peak memory of this process, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

# A process that has grown by less has little to return.
WORTHWHILE_BYTES = 64 << 20
_trimmed_rss = 0


def peak_rss() -> int | None:
    """Peak resident set size of this process in bytes, or None if unknown."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, getrusage would include the peak of the process before exec.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_memory() -> None:
    """Return freed memory to the system, if the process has grown by `WORTHWHILE_BYTES` since the last time.

    By itself, the C library only returns memory at the end of its heap. Collecting garbage takes half a second in a
    process that has imported torch, which is longer than the phases of a small model.
    """
    global _trimmed_rss
    before = _rss()
    if before is not None and before < _trimmed_rss + WORTHWHILE_BYTES:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    _trimmed_rss = _rss() or 0


def _rss() -> int | None:
    """Resident set size of this process in bytes, or None if unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return None
