"""Build or rebuild what an artifact needs on a certain machine, from the artifact alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..runtimes.artifact.link_file import link_file
from ..runtimes.artifact.manifest import Manifest
from ..runtimes.artifact.open import open_artifact
from ..runtimes.artifact.write import ArtifactWriter
from .targets.base import PhaseWatch
from .targets.registry import find_target


def finalize(artifact: str | Path, *, watch: PhaseWatch = lambda phase, done, total: None, **options: Any) -> Manifest:
    """Build the engines of an artifact again, for this machine or for the given GPUs.

    The artifact is replaced when the new one is complete.

    Args:
        artifact: its folder.
        watch: called with a phase, how many of its steps are done, and how many it has.
        options: the target's own options, such as `sm="8.9,12.0"`.

    Raises:
        LlmcError: what opening an artifact and building raise; FINALIZE_UNSUPPORTED if its target needs no such step.
    """
    folder = Path(artifact)
    manifest = open_artifact(folder)
    target = find_target(manifest.target)
    if not target.finalizes:
        raise UsageError(
            "FINALIZE_UNSUPPORTED",
            f"Artifacts of target {target.name} run as they are: there is nothing to build for one machine.",
            f"Run it: llmc run {folder}",
        )
    with ArtifactWriter(folder) as writer:
        for name in manifest.files:
            link_file(folder / name, writer.folder / name)
        return writer.commit(target.finalize(writer.folder, manifest, target.options(**options), watch))
