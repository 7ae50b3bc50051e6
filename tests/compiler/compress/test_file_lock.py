"""Locks on files: who excludes whom, and what happens when a locked file is removed."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.compress import file_lock


def test_an_exclusive_lock_excludes_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "lock"
    assert file_lock.try_lock(path) is None, "there is no file"
    with file_lock.lock(path):
        assert file_lock.try_lock(path) is None
    again = file_lock.try_lock(path)
    assert again is not None
    again.close()


def test_shared_locks_exclude_only_exclusive_ones(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock.lock(path, shared=True):
        with file_lock.lock(path, shared=True):
            assert file_lock.try_lock(path) is None
        assert file_lock.try_lock(path) is None


def test_a_waiting_process_does_not_get_a_removed_file(tmp_path: Path) -> None:
    path, locked = tmp_path / "lock", threading.Event()

    def wait() -> None:
        with file_lock.lock(path):
            found.append(path.exists() and file_lock.try_lock(path) is None)

    found: list[bool] = []
    waiting = threading.Thread(target=wait)
    held = file_lock.lock(path)
    waiting.start()
    locked.wait(0.2)  # until it waits; the test is also right if it doesn't yet
    file_lock.remove(path)
    held.close()
    waiting.join(30)
    assert found == [True], "a third process would have locked another file"


@pytest.mark.parametrize("missing", ["module", "filesystem"])
def test_without_locks_every_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    if missing == "module":
        monkeypatch.setattr(file_lock, "fcntl", None)
    else:
        monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    with file_lock.lock(tmp_path / "lock"):
        other = file_lock.try_lock(tmp_path / "lock")
    assert other is not None
    other.close()
