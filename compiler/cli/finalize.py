"""`llmc finalize`: build the engines of an artifact again, on the machine that runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import console
from .command import artifact_argument, json_option, print_json
from .options import ConfigVerb, given_options, with_options
from .progress import steps


@click.command(cls=ConfigVerb, short_help="Build the engines of an artifact for this machine or for other GPUs.")
@artifact_argument
@json_option
@with_options("sm", "library", "max_batch_size", "max_prompt_tokens", "export")
def finalize(artifact: Path, as_json: bool, **given: Any) -> None:
    """Build the engines of the artifact in DIR from its graph, in place of those that it has.

    The model isn't needed. By default the engines are for the GPUs of this machine; without one, for those of the
    engines before. The artifact is replaced when the new ones are complete.
    """
    with steps("import libraries") as watch:
        from ..finalize import finalize as build
        from ..targets.registry import find_target

        manifest = build(artifact, watch=watch, **given_options(given))
    if as_json:
        from dataclasses import asdict

        print_json({"path": str(artifact), "manifest": asdict(manifest)})
        return
    files = manifest.files.values()
    console.facts(
        [
            ("artifact", f"{artifact}: {manifest.model.name}, {manifest.target}"),
            ("size", f"{console.size(sum(file.bytes for file in files))} in {len(files)} files"),
            *(("note", remark) for remark in find_target(manifest.target).remarks(artifact, manifest)),
        ]
    )
    click.echo(f"\nTo see what was built: llmc inspect {artifact}")
