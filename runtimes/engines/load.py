"""Open an artifact with the engine of its target."""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LlmcError
from ..artifact.open import open_artifact
from .base import Engine
from .device_check import check_on_device

if TYPE_CHECKING:
    from collections.abc import Callable

_GROUP = "llmc.engines"


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    slots: int = 1,
    check_files: bool = True,
    check_device: bool = True,
) -> Engine:
    """Open an artifact. If it doesn't fit this machine, it is refused before anything is run.

    Args:
        threads: how many to compute with; by default one per physical core.
        slots: how many sequences to make room for; `Engine.open_slots` changes it.
        check_files: compare every file with its checksum.
        check_device: compare the engine with the model once on each device, if the artifact was compiled on a machine
            that couldn't run it.
    """
    folder = Path(path)
    manifest = open_artifact(folder, check_files)
    engine: Engine = find_engine(manifest.target)(folder, manifest, threads=threads, slots=slots)
    if check_device:
        try:
            check_on_device(engine, folder, manifest)
        except BaseException:
            engine.close()
            raise
    return engine


def find_engine(target: str) -> Callable[..., Any]:
    """Return the engine class for a target: from the folder beside this file that names the target, or a plugin.

    Raises:
        LlmcError: TARGET_UNKNOWN.
    """
    if folder := _folders().get(target):
        found: Callable[..., Any] = importlib.import_module(f".{folder}.engine", __package__).ENGINE
        return found
    for plugin in metadata.entry_points(group=_GROUP):
        if plugin.name == target:
            loaded: Callable[..., Any] = plugin.load()
            return loaded
    raise LlmcError(
        "TARGET_UNKNOWN",
        f"The artifact is for the target {target!r}, for which there is no engine here.",
        "Update llmc, or compile for another target.",
    )


@cache
def _folders() -> dict[str, str]:
    """Return the folders of engines, by the `TARGET` that each package declares. Importing a package is cheap."""
    folders = [path.parent.name for path in Path(__file__).parent.glob("*/engine.py")]
    return {importlib.import_module(f".{name}", __package__).TARGET: name for name in folders}
