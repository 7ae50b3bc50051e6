"""Caches keep what slots hold, and take memory only for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.runtimes.artifact.manifest import CacheSpec
from llmc.runtimes.engines.ort.caches import resized


def test_other_slots_keep_what_they_hold() -> None:
    spec = CacheSpec("static", heads=2, key_dim=3, value_dim=4, length=5, dtype="int8")
    old = resized(spec, [], np.zeros(2, np.int64))
    assert [(array.shape, array.dtype.name) for array in old] == [
        ((2, 2, 5, 3), "int8"), ((2, 2, 5, 4), "int8"), ((2, 2, 5, 1), "float32"), ((2, 2, 5, 1), "float32"),
    ]  # fmt: skip
    for array in old:
        assert not array.any()
        array[:] = np.arange(1, array.size + 1).reshape(array.shape) % 100 + 1
    for array, new in zip(old, resized(spec, old, np.array([5, 2, 0])), strict=True):
        assert np.array_equal(new[0], array[0]) and np.array_equal(new[1, :, :2], array[1, :, :2])
        assert not new[1, :, 2:].any() and not new[2].any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_short_sequence_takes_little_memory() -> None:
    """With pages of 2 MB, the first position of each head would take all of it."""
    spec = CacheSpec("static", heads=64, key_dim=64, value_dim=64, length=2048, dtype="fp32")
    before = resident()
    arrays = resized(spec, [], np.zeros(4, np.int64))
    for array in arrays:
        array[:, :, :1] = 1
    assert sum(array.nbytes for array in arrays) == 4 * spec.nbytes == 256 << 20
    assert resident() - before < 32 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
