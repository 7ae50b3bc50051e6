"""sha256 of files, in blocks and in parallel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 4 << 20


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal; memory is bounded by a block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def sha256_all(paths: Iterable[Path]) -> Iterator[str]:
    """The hashes of files, in their order. hashlib lets go of the GIL, so threads use all cores."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(sha256, paths)
