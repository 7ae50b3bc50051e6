"""From a folder to the engine that its manifest asks for."""

from __future__ import annotations

from pathlib import Path

from ...errors import LlmcError
from ..artifact.open import open_artifact
from .base import Engine


def load(path: str | Path, *, threads: int | None = None, slots: int = 1, check_files: bool = True) -> Engine:
    """Open an artifact; what doesn't fit this machine is refused before anything is run.

    Args:
        threads: how many to compute with; one for each physical core where none is given.
        slots: how many sequences to make room for; `Engine.open_slots` changes it.
        check_files: compare every file with its checksum.
    """
    folder = Path(path)
    manifest = open_artifact(folder, check_files)
    if manifest.target == "ort":
        from .ort.engine import OrtEngine

        return OrtEngine(folder, manifest, threads=threads, slots=slots)
    raise LlmcError(
        "TARGET_UNKNOWN", f"{folder} is for the target {manifest.target!r}.", "Update llmc, or compile for another."
    )
