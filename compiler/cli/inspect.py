"""`llmc inspect`: show the passes on a model, or the content of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .command import exit_with, json_option, model_argument, print_json
from .inspect_artifact import inspect_artifact
from .options import ConfigVerb, with_options
from .progress import progress

if TYPE_CHECKING:
    from ...passes.base import Pass, PassResult


@click.command(cls=ConfigVerb, short_help="Show the passes on a model, or the content of an artifact.")
@model_argument
@click.option(
    "--until",
    type=click.Choice(["canonical", "optimized"]),
    default="optimized",
    show_default=True,
    help="The stage to bring the program to.",
)
@click.option("--print", "show_program", is_flag=True, help="Print the program as Python.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write an interactive page."
)
@click.option(
    "--dump-ir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write the program before and after each pass.",
)
@json_option
@click.pass_context
@with_options("dtype", "max_seq_len")
def inspect(
    ctx: click.Context,
    model: str,
    until: str,
    show_program: bool,
    html: Path | None,
    dump_ir: Path | None,
    max_seq_len: int | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Run the passes on MODEL and show their matches, their misses with reasons, the ops by stage, and the layers.

    If MODEL is the folder of an artifact, show its files, caches and requirements, and the results of the gate.

    No weight is read. LLMC_FUEL=n stops rewriting after n matches, to find a rewrite that breaks a program.
    """
    if (Path(model) / "manifest.json").is_file():
        _refuse_options_of_models(ctx)
        inspect_artifact(ctx, Path(model), as_json)
        return
    if html and not html.parent.is_dir():
        raise click.BadParameter(f"There is no folder {str(html.parent)!r}.", param_hint="--html")
    with progress(f"capture {model}") as now:
        from ...ir.stages import Stage
        from ..inspect.page import write_page
        from ..inspect.record import inspect_model
        from ..inspect.summary import summarise

        def watch(subject: Pass, result: PassResult) -> None:
            now("passes", f"After {subject.name}: {result.matches} matches")

        inspection = inspect_model(
            model,
            until=Stage[until.upper()],
            dtype=dtype or "fp32",
            max_seq_len=max_seq_len,
            dump_ir=dump_ir,
            details=html is not None,
            watch=watch,
        )
        if html:
            now("write the page", "")
            write_page(inspection, html)
    summary = summarise(inspection)
    if as_json:
        print_json(summary | ({"program": str(inspection.program)} if show_program else {}))
    elif show_program:
        click.echo(str(inspection.program), nl=False)
    else:
        _show(summary)
    if html and not (as_json or show_program):
        click.echo(f"\nWrote {html}.")
    if inspection.refusal:
        exit_with(ctx, inspection.refusal)


def _refuse_options_of_models(ctx: click.Context) -> None:
    for option in ctx.command.get_params(ctx):
        source = ctx.get_parameter_source(option.name or "")
        if option.name not in ("model", "as_json") and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{option.opts[0]} works on a model only, and {ctx.params['model']!r} is an artifact. Leave it out."
            )


def _show(summary: dict[str, Any]) -> None:
    stages: dict[str, dict[str, Any]] = summary["stages"]
    console.facts(
        [
            ("model", summary["model"]),
            ("stage", summary["stage"]),
            ("parameters", f"{summary['parameters']:,}"),
            ("computes in", summary["dtype"]),
            ("positions", f"{summary['max_seq_len']:,}"),
            ("nodes", ", ".join(f"{moment['nodes']:,} {name}" for name, moment in stages.items())),
        ]
    )
    console.heading("Passes")
    console.table(
        ["pass", "stage", "matches", "misses", "ms"],
        [
            [p["name"], p["stage"], p["matches"], sum(m["count"] for m in p["misses"]), p["ms"]]
            for p in summary["passes"]
        ],
    )
    missed = [[p["name"], m["count"], m["reason"], m["at"][0]] for p in summary["passes"] for m in p["misses"]]
    if missed:
        console.heading("Left alone")
        console.table(["pass", "misses", "reason", "for example"], missed)
    console.heading("Ops")
    names = {op for moment in stages.values() for op in moment["ops"]}
    ordered = sorted(names, key=lambda op: (not op.startswith("llmc."), op))
    console.table(["op", *stages], [[op, *(moment["ops"].get(op, 0) for moment in stages.values())] for op in ordered])
    console.heading("Layers")
    for group in summary["layers"]:
        many = len(group["layers"])
        ops = ", ".join(f"{op.removeprefix('llmc.')} {count}" for op, count in group["ops"].items())
        console.paragraph(f"{group['name']}{': the same' if many > 1 else ''}: {ops}")
