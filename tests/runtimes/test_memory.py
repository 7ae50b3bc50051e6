"""Peak memory grows with allocations and stays after they are freed."""

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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows doesn't report peak memory this way")
def test_peak_rss_counts_this_process_and_stays() -> None:
    mine = peak_rss()
    assert mine is not None
    bytearray(b"x") * (200 << 20)  # in the parent: the child must not count it
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True)
    assert 95 << 20 < int(done.stdout) < 150 << 20
