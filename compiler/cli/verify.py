"""`llmc verify`: run the gate again on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .command import CHECK_FAILED, Verb, artifact_argument, json_option, print_json
from .progress import progress

if TYPE_CHECKING:
    from ...runtimes.engines.selfcheck import GateReport


@click.command(cls=Verb, short_help="Compare an artifact with its model on this machine.")
@artifact_argument
@click.argument("model", required=False)
@json_option
@click.pass_context
def verify(ctx: click.Context, artifact: Path, model: str | None, as_json: bool) -> None:
    """Compare the logits of the artifact in DIR with those of MODEL in transformers.

    Without MODEL, compare with reference logits that `llmc compile` stored in the artifact. Exit status 1 if a check
    fails.
    """
    with progress(f"verify {artifact}"):
        from ..gate.verify import verify as compare
        from ..gate.verify import why_not_engine

        report = compare(artifact, model)
    if reason := why_not_engine(artifact):
        click.echo(f"Checked the graph, not the engine: {reason}.", err=True)
    if as_json:
        print_json(report.as_dict())
    else:
        _show(report)
    if not report.passed:
        ctx.exit(CHECK_FAILED)


def _show(report: GateReport) -> None:
    show_checks(report.as_dict()["checks"])
    failed = sum(not check.ok for check in report.checks)
    click.echo(f"\n{failed} of {len(report.checks)} checks failed." if failed else "\nAll checks passed.")


def show_checks(checks: Any) -> None:
    """Print the results of the gate, from its JSON document, as a table."""
    rows = [[c["name"], f"{c['measured']:.3g}", f"{c['limit']:.3g}", "yes" if c["ok"] else "NO"] for c in checks]
    console.table(["check", "measured", "limit", "ok"], rows)
