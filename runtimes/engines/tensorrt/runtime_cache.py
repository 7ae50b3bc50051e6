"""Kernels that TensorRT for RTX compiles when a plan first runs, kept from process to process."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...cache_folder import cache_dir
from ...cuda.driver import Device


def cache_path(plan_hash: str, version: str, device: Device) -> Path:
    """Return the file for a plan, a version of the library and a device."""
    parts = "\n".join((plan_hash, version, device.name, device.sm, device.driver))
    return cache_dir() / "tensorrt" / f"{hashlib.sha256(parts.encode()).hexdigest()}.cache"


class RuntimeCache:
    """The library's runtime cache, read from a file and written to it.

    A file that can't be read or written only costs time, so it is no error. The library itself refuses content of
    another version or device.

    Args:
        cache: the library's object.
    """

    def __init__(self, cache: Any, path: Path) -> None:
        self.cache = cache
        self._path = path
        self._stored = 0
        with suppress(OSError):
            content = path.read_bytes()
            if cache.deserialize(content):
                self._stored = len(content)

    def store(self) -> None:
        """Write the cache, if it has grown since it was read or written."""
        content = self.cache.serialize()
        size = 0 if content is None else len(memoryview(content))
        if size in (0, self._stored):
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may write the file; each rename puts a whole one in place.
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(name, self._path)
                self._stored = size
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
