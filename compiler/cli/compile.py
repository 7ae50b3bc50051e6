"""`llmc compile`: from a model to a verified artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import sheet
from .progress import steps
from .verb import Verb, dtype_option, json_option, max_seq_len_option, model_argument, print_json

if TYPE_CHECKING:
    from ..api import Artifact

_SCHEMES = ["int8", "int4", "w8a8"]


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
@click.option("--int8", is_flag=True, help="Short for --quantize int8.")
@click.option("--int4", is_flag=True, help="Short for --quantize int4.")
@click.option(
    "--quantize",
    type=click.Choice(_SCHEMES),
    help="int8 and int4: weights; w8a8: weights and activations in int8.",
)
@click.option(
    "--group-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Weights that share a scale, in int4.  [default: the scheme's]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["ring", "static"]),
    default="ring",
    show_default=True,
    help="ring: layers with a sliding window keep that window only; static: all positions.",
)
@max_seq_len_option
@click.option(
    "--ops",
    type=click.Choice(["contrib", "standard"]),
    default="contrib",
    show_default=True,
    help="ONNX Runtime's own ops, which are faster, or those of the ONNX standard alone.",
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
    target: str,
    dtype: str,
    int8: bool,
    int4: bool,
    quantize: str | None,
    group_size: int | None,
    kv_cache: str,
    max_seq_len: int | None,
    ops: str,
    dump_ir: Path | None,
    no_verify: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Compile MODEL into an artifact: a folder that `llmc run` needs nothing else to run.

    The artifact is compared with the model in transformers before it is put in its place. Exit status 1 if it differs
    by more than its precision explains; nothing is written then.
    """
    schemes = {scheme for scheme, asked in (("int8", int8), ("int4", int4), (quantize, quantize)) if asked}
    if len(schemes) > 1:
        raise click.UsageError(f"Weights are rounded once: choose one of {', '.join(sorted(map(str, schemes)))}.")
    if group_size and not schemes:
        raise click.UsageError("--group-size is about quantized weights: give --int8, --int4 or --quantize.")
    with steps(f"Capturing {model}") as watch:
        from ..api import compile

        artifact = compile(
            model,
            output,
            target=target,
            dtype=dtype,
            quantize=next(iter(schemes), None),
            group_size=group_size,
            kv_cache=kv_cache,
            max_seq_len=max_seq_len,
            ops=ops,
            dump_ir=dump_ir,
            verify=not no_verify,
            trust_remote_code=trust_remote_code,
            watch=watch,
        )
    if as_json:
        print_json(_document(artifact))
    else:
        _show(artifact, verified=not no_verify)


def _document(artifact: Artifact) -> dict[str, Any]:
    return {"path": str(artifact.path), "report": artifact.report, "manifest": asdict(artifact.manifest)}


def _show(artifact: Artifact, verified: bool) -> None:
    manifest, report = artifact.manifest, artifact.report
    scheme = (manifest.quantization or {}).get("scheme", "not quantized")
    seconds = report["seconds"]
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    files = manifest.files.values()
    sheet.facts(
        [
            ("artifact", f"{artifact.path}: {manifest.model['name']}, {manifest.target}, {scheme}"),
            ("size", f"{sheet.size(sum(file.bytes for file in files))} in {len(files)} files"),
            ("gate", "passed" if verified else "left out (--no-verify)"),
            ("time", f"{sum(seconds.values()):.1f} s: {phases}"),
            ("peak memory", sheet.size(max(report["peak_rss_bytes"].values()))),
        ]
    )
    click.echo(f'\nTo run it: llmc run {artifact.path} "Write two sentences about the sea."')
