"""Text and tables on stdout: drawn by rich on a terminal, aligned plain text in a pipe or a log."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ...runtimes.artifact.manifest import MaxKlSpec, PruningSpec, QuantizationSpec, Verified
    from ..targets.base import Table

Cell = str | int | float


def heading(text: str) -> None:
    """Print a heading after an empty line."""
    click.echo()
    click.secho(text, bold=True)


def paragraph(text: str) -> None:
    """Print text wrapped to the terminal's width, with a hanging indent; in a pipe, print one line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 20
    click.echo(textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print one name and value per line, with the values aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {value}")


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table. Columns that contain a number are aligned to the right."""
    cells = [[_show(cell) for cell in row] for row in rows]
    right = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    if sys.stdout.isatty():
        _rich_table(columns, cells, right)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        padded = [f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(row, widths, right, strict=True)]
        click.echo("  ".join(padded).rstrip())


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, is_right in zip(columns, right, strict=True):
        shown.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    Console().print(shown)


def _show(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.1f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def size(nbytes: float) -> str:
    """Format a number of bytes: `269 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if nbytes >= 99.5 or unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"


def gate(verified: Verified) -> str:
    """Return in words where an artifact passed the gate."""
    if verified.on_device == "gate":
        return "passed by the graph; the engine follows on each device, when it is loaded there for the first time"
    return "passed"


def max_kl(result: MaxKlSpec) -> str:
    """Format the result of `--max-kl`: `0.018 nats per token over 8,192 tokens, ...`."""
    return (
        f"{result.measured:.2g} nats per token over {result.tokens:,} tokens, including two standard errors; the "
        f"smallest artifact under {result.limit:g} in {result.trials} trials"
    )


def weights(quantization: QuantizationSpec) -> str:
    """Format how weights are quantized: `gptq: 90 int4 in groups of 64, 30 int8 by channel`."""
    most_first = sorted(quantization.weights.items(), key=lambda entry: (-entry[1], entry[0]))
    counts = ", ".join(f"{count} {grid}" for grid, count in most_first)
    return f"{quantization.algorithm}: {counts}"


def pruning(spec: PruningSpec) -> str:
    """Format dropped layers and pruned weights: `without layers.3; 2:4 by sparsegpt: 50.0% zeros in 120 weights`."""
    parts = []
    if layers := spec.layers:
        parts.append(f"without {', '.join(layers.dropped)}")
    if weights := spec.weights:
        parts.append(
            f"{weights.pattern} by {weights.algorithm}: {weights.sparsity:.1%} zeros in {weights.pruned} weights"
        )
    return "; ".join(parts)


def target_table(shown: Table) -> None:
    """Print a table of a target, with its title."""
    heading(shown.title)
    if shown.columns:
        table(shown.columns, shown.rows)  # type: ignore[arg-type]
    else:
        facts([(str(name), str(value)) for name, value in shown.rows])
