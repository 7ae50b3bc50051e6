"""How many threads are worth having: one for each physical core that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(cpus: Path = _CPUS, quota: Path = _QUOTA) -> int:
    """Physical cores among the allowed ones, no more than the container's share of time pays for; at least 1.

    Two hyperthreads share the units that a matmul keeps busy: a thread for each would only wait.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpus, cpu) for cpu in allowed}
    return max(1, min(len(cores), _share(quota)))


def _siblings(cpus: Path, cpu: int) -> str:
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _share(quota: Path) -> int:
    try:
        allowed, period = quota.read_text().split()
        return math.ceil(int(allowed) / int(period))
    except (OSError, ValueError):  # no cgroup, or "max"
        return 2**31
