"""Describe the machine, and wait until it is idle."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from llmc.compiler.inspect.doctor import read_cpu
from llmc.runtimes.engines.cores import physical_cores


def describe(threads: int) -> str:
    """Describe the machine in one line.

    It has the processor, cores, matmul-related instruction sets, memory and kernel.
    """
    cpu = read_cpu(Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{physical_cores()} cores, {threads} threads used"
    return ", ".join([cpu.model, cores, " ".join(cpu.instructions), f"{memory:.0f} GiB", f"Linux {platform.release()}"])


def wait_until_quiet(limit: float = 0.05, patience_s: float = 600) -> None:
    """Wait until less than `limit` of the processors' time is used.

    One busy core can halve another core's speed.
    """
    deadline = time.monotonic() + patience_s
    while (busy := busy_share(1.0)) > limit:
        if time.monotonic() > deadline:
            raise SystemExit(f"Other processes keep the machine {busy:.0%} busy; stop them, or set --noisy.")


def busy_share(seconds: float) -> float:
    """Measure the busy share of all processors' time over the next `seconds`."""
    idle, total = cpu_ticks()
    time.sleep(seconds)
    idle_after, total_after = cpu_ticks()
    return 1 - (idle_after - idle) / (total_after - total)


def cpu_ticks() -> tuple[int, int]:
    """Return the processors' ticks since boot: idle or waiting for I/O, and total."""
    ticks = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
