"""The machine that is measured: what it is, and whether it has nothing else to do."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from llmc.compiler.inspect.doctor import read_cpu
from llmc.runtimes.engines.cores import physical_cores


def describe(threads: int) -> str:
    """Processor, cores, the instructions that matter to matmuls, memory and kernel, in one line."""
    cpu = read_cpu(Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{physical_cores()} cores, {threads} threads used"
    return ", ".join([cpu.model, cores, " ".join(cpu.instructions), f"{memory:.0f} GiB", f"Linux {platform.release()}"])


def wait_until_quiet(limit: float = 0.05, patience_s: float = 600) -> None:
    """Return once the machine spends less than `limit` of its time; one busy core can halve what another measures."""
    deadline = time.monotonic() + patience_s
    while (busy := busy_share(1.0)) > limit:
        if time.monotonic() > deadline:
            raise SystemExit(f"The machine is {busy:.0%} busy with something else; stop that, or give --noisy.")


def busy_share(seconds: float) -> float:
    """The share of all processors' time that was not idle, over the next seconds."""
    idle, total = _times()
    time.sleep(seconds)
    idle_then, total_then = _times()
    return 1 - (idle_then - idle) / (total_then - total)


def _times() -> tuple[int, int]:
    """Ticks since boot: idle or waiting for a disk, and all."""
    ticks = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
