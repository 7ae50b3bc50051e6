"""From the neutral artifact to engines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ....runtimes.artifact.decode import encode
from ....runtimes.artifact.manifest import Manifest
from ....runtimes.engines.tensorrt.library import find_library
from ....runtimes.engines.tensorrt.section import DECODE, PREFILL, Profile, read_section
from ..base import PhaseWatch
from .build import build
from .machine import wanted_sms
from .options import TensorRtOptions
from .triton_server import REPOSITORY, check_library, write_model_folder


def build_engines(folder: Path, manifest: Manifest, options: TensorRtOptions, watch: PhaseWatch) -> Manifest:
    """Build an engine in the folder of an artifact, in place of those that it has.

    Returns:
        The manifest that names it.
    """
    library = find_library(options.library)
    if options.export:
        check_library(library.name)
    old = read_section(manifest)
    section = replace(old, profiles=profiles_of(options, manifest.max_seq_len), plans=[])
    for plan in old.plans:
        for name in (plan.file, plan.record):
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / REPOSITORY, ignore_errors=True)
    plan = build(library, folder / section.graph, section, manifest.caches, wanted_sms(options), folder, watch)
    if options.export:
        write_model_folder(folder, manifest, section, plan)
    made = {**manifest.built_with, library.name: library.version}
    return replace(manifest, section=encode(replace(section, plans=[plan])), built_with=made, files={})


def profiles_of(options: TensorRtOptions, max_seq_len: int) -> dict[str, Profile]:
    """Return the profiles of an engine, in their order."""
    return {
        PREFILL: Profile(1, min(options.max_prompt_tokens, max_seq_len)),
        DECODE: Profile(options.max_batch_size, 1),
    }
