"""Hashes computed in blocks equal hashes of whole files."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from llmc.runtimes.artifact import hashing


@pytest.mark.parametrize("size", [0, 1, hashing.BLOCK_BYTES, hashing.BLOCK_BYTES + 3])
def test_a_file_of_any_size(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert hashing.sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_hashes_keep_the_order_of_the_files(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    assert hashing.sha256_all(paths) == [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(FileNotFoundError):
        hashing.sha256_all([tmp_path / "missing", *[tmp_path / str(i) for i in range(20)]])
    assert threading.active_count() == before
