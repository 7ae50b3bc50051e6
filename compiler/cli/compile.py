"""`llmc compile`: from a model to a verified artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...extras import require
from . import console
from .command import json_option, model_argument, print_json
from .failures import name_flags
from .options import ConfigVerb, given_options, with_options
from .progress import steps

if TYPE_CHECKING:
    from ..api import Artifact

# Schemes with a flag of their own.
_SHORT = ("int8", "int4", "fp8")


def _shorthands(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for each scheme that has one."""
    for name in reversed(_SHORT):
        command = click.option(f"--{name}", is_flag=True, help=f"Short for --quantize {name}.")(command)
    return command


@click.command("compile", cls=ConfigVerb, short_help="Compile a model into a verified artifact.")
@model_argument
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The artifact's folder; an older artifact there is replaced.",
)
@_shorthands
@click.option(
    "--ignore", multiple=True, metavar="PATTERN", help="Keep matching weights as they are: '*.layers.0.*'. Repeatable."
)
@click.option(
    "--config",
    "recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A recipe, TOML or JSON: these options, and exceptions for single weights.",
)
@click.option(
    "--dump-ir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write the program before and after each pass.",
)
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the model in transformers.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python that the model brings along.")
@json_option
@click.pass_context
@with_options()
def compile_(
    ctx: click.Context,
    model: str,
    output: Path,
    ignore: Sequence[str],
    recipe: Path | None,
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
    from ..targets.registry import find_target, make_config

    config = make_config(**_choices(given, ignore, recipe))
    target = find_target(config.target)
    packages = target.facts_for(config).packages
    require("torch", "transformers", *packages["compile"], *([] if no_verify else packages["run"]))
    for warning in target.warnings(config):
        click.echo(name_flags(warning, ctx.command.get_params(ctx)), err=True)
    with steps("import libraries") as watch:
        from ..api import compile

        artifact = compile(
            model,
            output,
            config,
            dump_ir=dump_ir,
            verify=not no_verify,
            trust_remote_code=trust_remote_code,
            watch=watch,
        )
    if as_json:
        print_json(_document(artifact))
    else:
        _show(artifact, verified=not no_verify)


def _choices(given: dict[str, Any], ignore: Sequence[str], recipe: Path | None) -> dict[str, Any]:
    """Return keyword options: those of the recipe, overridden by those of the command line."""
    from ...passes.quantize.schemes import Override
    from ..recipe import read_recipe

    chosen = given_options(given)
    schemes = {name for name in _SHORT if given[name]} | ({given["quantize"]} - {None})
    if len(schemes) > 1:
        raise click.UsageError(f"Weights are quantized once: choose one of {', '.join(sorted(schemes))}.")
    if schemes:
        chosen["quantize"] = schemes.pop()
    from_recipe = read_recipe(recipe) if recipe else {}
    overrides = [*from_recipe.pop("overrides", []), *(Override(pattern, None) for pattern in ignore)]
    return {**from_recipe, **chosen, "overrides": overrides}


def _document(artifact: Artifact) -> dict[str, Any]:
    passes = [{"graph": run.graph, **asdict(run.record), "stage": str(run.record.stage)} for run in artifact.passes]
    report = {**artifact.report, "passes": passes}
    return {"path": str(artifact.path), "report": report, "manifest": asdict(artifact.manifest)}


def _show(artifact: Artifact, verified: bool) -> None:
    from ..targets.registry import find_target

    manifest, report = artifact.manifest, artifact.report
    quantization = manifest.quantization
    scheme = (quantization and quantization.scheme) or "not quantized"
    seconds = report["seconds"]
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    files = manifest.files.values()
    facts = [("artifact", f"{artifact.path}: {manifest.model.name}, {manifest.target}, {scheme}")]
    if quantization:
        facts.append(("weights", console.weights(quantization)))
        if quantization.why:
            facts.append(("note", quantization.why))
        if quantization.max_kl:
            facts.append(("divergence", console.max_kl(quantization.max_kl)))
    if manifest.pruning:
        facts.append(("pruned", console.pruning(manifest.pruning)))
    facts += [
        ("size", f"{console.size(sum(file.bytes for file in files))} in {len(files)} files"),
        ("gate", console.gate(manifest.verified) if verified else "skipped (--no-verify)"),
        *(("note", remark) for remark in find_target(manifest.target).remarks(artifact.path, manifest)),
        ("time", f"{sum(seconds.values()):.1f} s: {phases}"),
        ("peak memory", console.size(max(report["peak_rss_bytes"].values()))),
    ]
    console.facts(facts)
    click.echo(f'\nTo run it: llmc run {artifact.path} "Write two sentences about the sea."')
