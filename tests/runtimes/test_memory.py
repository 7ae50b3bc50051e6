"""Peak memory stays after memory is freed; freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmc.runtimes.memory import peak_rss

GROWING = """
from llmc.runtimes.memory import peak_rss
before = peak_rss()
held = bytearray(b"x") * (100 << 20)
del held
print(peak_rss() - before)
"""

# Small blocks of a cycle, and a block after them that keeps the end of the heap in use.
TRIMMED = """
import os, sys
from pathlib import Path
from llmc.runtimes.memory import trim_memory
def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
trim_memory()
before = rss()
class Held: pass
held = Held()
held.itself, held.blocks, after = held, [bytes([i % 256]) * 5000 for i in range(int(sys.argv[1]))], b"x" * 5000
grown = rss() - before
del held
trim_memory()
print(grown, rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can trim")
def test_what_was_freed_goes_back_if_it_is_much() -> None:
    def grown(blocks: int) -> tuple[int, int]:
        command = [sys.executable, "-c", TRIMMED, str(blocks)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        held, left = map(int, done.stdout.split())
        return held, left

    held, left = grown(20_000)
    assert held > 90 << 20 and left < 30 << 20
    held, left = grown(2_000)
    assert 9 << 20 < held < 40 << 20 and left > 0.9 * held, "a small process is left alone"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows doesn't report peak memory this way")
def test_peak_rss_counts_this_process_and_stays() -> None:
    mine = peak_rss()
    assert mine is not None
    bytearray(b"x") * (200 << 20)  # in the parent: the child must not count it
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True)
    assert 95 << 20 < int(done.stdout) < 150 << 20
