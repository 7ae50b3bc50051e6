"""SHA-256 of files, block by block and in parallel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 4 << 20


def sha256(path: Path) -> str:
    """Return the hexadecimal hash of a file; only one block of it is in memory."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def sha256_all(paths: Iterable[Path]) -> list[str]:
    """Return the hashes of files, in order.

    hashlib releases the GIL, so the threads use several cores. All threads have ended when this returns: a generator
    that is left halfway would end them wherever garbage is collected, and wait forever inside the start of a thread.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256, paths))
