"""Text and tables on stdout: by rich on a terminal, aligned plain text in a pipe or a log."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import click

Cell = str | int | float


def heading(text: str) -> None:
    """A line above what belongs to it."""
    click.echo()
    click.secho(text, bold=True)


def paragraph(text: str) -> None:
    """Text wrapped to the terminal, further lines indented; a pipe gets it in one line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 20
    click.echo(textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, one a line, values below each other."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {value}")


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Rows under a head; numbers stand right, and so does a column that holds them."""
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
    """Bytes as people say them: `269 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if nbytes >= 99.5 or unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"


def kept_under(max_kl: dict[str, float]) -> str:
    """What came of `--max-kl`, as the manifest says: `0.018 nats a token over 8,192 tokens, the smallest of ...`."""
    return (
        f"{max_kl['measured']:.2g} nats a token over {max_kl['tokens']:,} tokens, two standard errors among them; the "
        f"smallest under {max_kl['limit']:g} of {max_kl['trials']} artifacts that were tried"
    )


def weights(quantization: dict[str, Any]) -> str:
    """What became of a model's weights, as its manifest says: `gptq: 90 int4 in groups of 64, 30 int8 by channel`."""
    most_first = sorted(quantization["weights"].items(), key=lambda entry: (-entry[1], entry[0]))
    counts = ", ".join(f"{count} {grid}" for grid, count in most_first)
    why = f" ({quantization['why']})" if quantization["why"] else ""
    return f"{quantization['algorithm']}{why}: {counts}"
