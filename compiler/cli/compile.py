"""`llmc compile`: from a model to a verified artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...extras import require
from . import console
from .command import (
    Verb,
    dtype_option,
    json_option,
    kv_cache_dtype_option,
    max_seq_len_option,
    model_argument,
    print_json,
)
from .progress import steps
from .pruning_options import pruning_line, pruning_options, warn_of_zeros
from .rounding_options import choices, rounding_options, warn_of_float8

if TYPE_CHECKING:
    from ..api import Artifact


@click.command("compile", cls=Verb, short_help="Compile a model into a verified artifact.")
@model_argument
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The artifact's folder; an older artifact there is replaced.",
)
@click.option("--target", type=click.Choice(["ort"]), default="ort", show_default=True, help="The runtime to serve.")
@dtype_option
@rounding_options
@pruning_options
@click.option(
    "--kv-cache",
    type=click.Choice(["ring", "static"]),
    help="ring: layers with a sliding window keep that window only; static: all positions.  [default: ring]",
)
@kv_cache_dtype_option
@max_seq_len_option
@click.option(
    "--ops",
    type=click.Choice(["contrib", "standard"]),
    help="ONNX Runtime's own ops, which are faster, or those of the ONNX standard alone.  [default: contrib]",
)
@click.option(
    "--dump-ir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write the program before and after each pass.",
)
@click.option("--no-verify", is_flag=True, help="Leave out the comparison with the model in transformers.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python that the model brings along.")
@json_option
def compile_(
    model: str,
    output: Path,
    dump_ir: Path | None,
    no_verify: bool,
    trust_remote_code: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Compile MODEL into an artifact: a folder that `llmc run` needs nothing else to run.

    The artifact is compared with the model in transformers before it is put in its place. Exit status 1 if it differs
    by more than its precision explains; nothing is written then.
    """
    require("torch", "transformers", "onnx", *([] if no_verify else ["onnxruntime"]))
    chosen = choices(given)
    warn_of_zeros(chosen)
    warn_of_float8(chosen)
    with steps("import libraries") as watch:
        from ..api import compile

        artifact = compile(
            model,
            output,
            dump_ir=dump_ir,
            verify=not no_verify,
            trust_remote_code=trust_remote_code,
            watch=watch,
            **chosen,
        )
    if as_json:
        print_json(_document(artifact))
    else:
        _show(artifact, verified=not no_verify)


def _document(artifact: Artifact) -> dict[str, Any]:
    return {"path": str(artifact.path), "report": artifact.report, "manifest": asdict(artifact.manifest)}


def _show(artifact: Artifact, verified: bool) -> None:
    manifest, report = artifact.manifest, artifact.report
    rounding = manifest.quantization or {}
    scheme, max_kl = rounding.get("scheme") or "not quantized", rounding.get("max_kl")
    seconds = report["seconds"]
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    files = manifest.files.values()
    console.facts(
        [
            ("artifact", f"{artifact.path}: {manifest.model['name']}, {manifest.target}, {scheme}"),
            *([("weights", console.weights(manifest.quantization))] if manifest.quantization else []),
            *([("divergence", console.kept_under(max_kl))] if max_kl else []),
            *([("pruned", pruning_line(manifest.pruning))] if manifest.pruning else []),
            ("size", f"{console.size(sum(file.bytes for file in files))} in {len(files)} files"),
            ("gate", "passed" if verified else "left out (--no-verify)"),
            ("time", f"{sum(seconds.values()):.1f} s: {phases}"),
            ("peak memory", console.size(max(report["peak_rss_bytes"].values()))),
        ]
    )
    click.echo(f'\nTo run it: llmc run {artifact.path} "Write two sentences about the sea."')
