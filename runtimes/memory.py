"""The most memory that this process has held, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path


def peak_rss() -> int | None:
    """Bytes of the largest resident set so far; None where the system tells it in no known way."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage, on Linux, goes on counting what the process was before exec.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Hand freed memory back to the system, which the C library does by itself only at the end of its heap."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
