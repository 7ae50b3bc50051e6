"""The peak of memory is the peak: it grows with what is held, and stays when that is gone."""

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


@pytest.mark.skipif(sys.platform == "win32", reason="tells it in no known way")
def test_it_is_of_this_process_and_stays() -> None:
    mine = peak_rss()
    assert mine is not None
    bytearray(b"x") * (200 << 20)  # of a parent, which a child must not count
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True)
    assert 95 << 20 < int(done.stdout) < 150 << 20
