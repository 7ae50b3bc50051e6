"""Peak memory of this process, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path


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
    """Return freed memory to the system.

    By itself, the C library only returns memory at the end of its heap.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
