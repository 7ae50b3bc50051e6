"""On-disk cache of calibration results; interrupted runs resume, and simultaneous identical runs share them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ...ir.weights import Leaf, SafetensorsSource
from . import file_lock

# Increased whenever calibration would produce other results for the same model, plan and text, or store them otherwise.
_VERSION = 4


class CalibrationCache:
    """A folder of small files, each complete or absent.

    Several processes may use one folder at a time: each result is computed by one of them, and the others wait for it.
    While an instance has results in use, no other one removes the folder; `clear` or `close` ends that. A process that
    dies holds nothing.

    Args:
        folder: created when the first result is stored. Its lock file is beside it, named `<folder>.lock`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._in_use: FileIO | None = None

    @classmethod
    def of(cls, home: Path, *depends_on: object) -> CalibrationCache:
        """Return the cache of a calibration, identified by everything that its results depend on."""
        digest = hashlib.sha256(repr((_VERSION, torch.__version__)).encode())
        for part in depends_on:
            digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        return cls(home / "calibration" / digest.hexdigest()[:32])

    def __enter__(self) -> CalibrationCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Leaf]:
        """Return the tensors stored under a name; `make` computes them if they are missing or damaged.

        Values are read from the file when they are evaluated, so they must not be evaluated after `clear` or `close`.
        """
        if self._in_use is None:
            self._in_use = file_lock.lock(self._lock, shared=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        tensors = _read(path)
        if tensors is None:
            tensors = _make_once(path, make)
        return {key: Leaf(_source(path, key, tensor)) for key, tensor in tensors.items()}

    def clear(self) -> None:
        """Remove the results, unless another live process uses them: the last one to finish removes them."""
        self.close()
        if alone := file_lock.try_lock(self._lock):
            with alone:
                shutil.rmtree(self.folder, ignore_errors=True)
                file_lock.remove(self._lock)

    def close(self) -> None:
        """Stop using the results, but leave them on disk for the next run."""
        if self._in_use is not None:
            self._in_use.close()
            self._in_use = None

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")


def _make_once(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Compute and store tensors, or return those that another process stored meanwhile."""
    lock = path.with_suffix(".lock")
    with file_lock.lock(lock):
        tensors = _read(path)
        if tensors is None:
            tensors = make()
            _store(tensors, path)
        file_lock.remove(lock)
    return tensors


def _store(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="storing-", dir=path.parent) as folder:
        save_file(tensors, Path(folder, path.name))
        os.replace(Path(folder, path.name), path)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _source(path: Path, key: str, tensor: Tensor) -> SafetensorsSource:
    return SafetensorsSource(path, key, tuple(tensor.shape), tensor.dtype, tensor.nbytes)
