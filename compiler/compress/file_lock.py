"""Locks on files, shared or exclusive, that the system releases when their process dies."""

from __future__ import annotations

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock; every lock succeeds there
    fcntl = None  # type: ignore[assignment]


def lock(path: Path, *, shared: bool = False) -> FileIO:
    """Wait for a lock on a file, which is created where it is missing, with its folder.

    Closing the result releases the lock. Each call locks independently, also within one process. Where the system or
    the filesystem has no locks, every call succeeds.

    Args:
        shared: allow other shared locks at the same time; by default the lock is exclusive.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
        _flock(file, shared, wait=True)
        if _is_at(path, file):
            return file
        # Its holder removed the file after it was opened here: the next process would lock a new one.
        file.close()


def try_lock(path: Path) -> FileIO | None:
    """Lock a file exclusively, or return None if it is locked or missing."""
    try:
        file = path.open("r+b", buffering=0)
    except FileNotFoundError:
        return None
    if _flock(file, shared=False, wait=False) and _is_at(path, file):
        return file
    file.close()
    return None


def remove(path: Path) -> None:
    """Remove the file of an exclusive lock that the caller holds."""
    with suppress(OSError):  # Windows keeps a file that is open
        path.unlink()


def _flock(file: FileIO, shared: bool, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # the filesystem has no locks
        return True
    return True


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
