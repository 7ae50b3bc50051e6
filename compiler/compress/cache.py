"""What calibration has found so far, on disk: it need not lie in memory, and who is interrupted goes on from there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...ir.weights import Leaf, SafetensorsSource

# Raised whenever calibration would find something else for the same model, plan and text.
_VERSION = 3


class Shelf:
    """A folder of small files, each whole or not there.

    Args:
        folder: is made when something is put into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, home: Path, *depends_on: object) -> Shelf:
        """The shelf of a calibration, by all that its results depend on."""
        digest = hashlib.sha256(repr((_VERSION, torch.__version__)).encode())
        for part in depends_on:
            digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        return cls(home / "calibration" / digest.hexdigest()[:32])

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Leaf]:
        """The tensors by this name, made only if they are not there yet; read when their value is asked for."""
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".making")
            save_file(make(), beside)
            os.replace(beside, path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
            return self.keep(name, make)
        return {key: Leaf(_source(path, key, tensor)) for key, tensor in tensors.items()}

    def clear(self) -> None:
        """Take the folder away, once nothing reads from it any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _source(path: Path, key: str, tensor: Tensor) -> SafetensorsSource:
    return SafetensorsSource(path, key, tuple(tensor.shape), tensor.dtype, tensor.nbytes)
