"""Default number of threads: the physical cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(cpus: Path = _CPUS, quota: Path = _QUOTA) -> int:
    """Number of physical cores that this process may use, at least 1.

    Bounded by the CPU affinity and by the container's quota of CPU time. Two hyperthreads share the units that a
    matmul keeps busy, so a second thread on the same core would only wait.

    Args:
        cpus: the CPU topology in sysfs.
        quota: the cgroup's `cpu.max` file.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpus, cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota_cores(quota)))


def _siblings(cpus: Path, cpu: int) -> str:
    """List of the hyperthreads on the core of a CPU, which identifies the core."""
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota_cores(quota: Path) -> int:
    """Number of cores that the quota pays for, rounded up; huge without a quota."""
    try:
        allowed, period = quota.read_text().split()  # microseconds of CPU time per period
        return math.ceil(int(allowed) / int(period))
    except (OSError, ValueError):  # no cgroup, or "max"
        return 2**31
