"""What is being done and for how long, on stderr, for somebody who watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


@contextmanager
def progress(phase: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the phase and its time if stderr is a terminal, else nothing; call it to name the next phase."""
    if not sys.stderr.isatty():
        yield lambda phase: None
        return
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    with _on_stderr(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        task = bar.add_task(phase)
        yield lambda phase: bar.reset(task, description=phase)


@contextmanager
def steps(phase: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the phase, its steps, the time left and the peak of memory, on a terminal only.

    Call it with a phase, the steps that are done, and all of them; a phase of 0 steps shows what time it took.
    """
    if not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[steps]}")
    memory = TextColumn("{task.fields[memory]}")
    with _on_stderr(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), memory) as bar:
        task = bar.add_task(phase, total=None, steps="", memory=_peak())
        current = phase

        def watch(phase: str, done: int, total: int) -> None:
            nonlocal current
            if phase != current:
                bar.reset(task, description=phase)
                current = phase
            count = f"{done}/{total}" if total else ""
            bar.update(task, completed=done, total=total or None, steps=count, memory=_peak())

        yield watch


def _on_stderr(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    # Bound to this stderr: capture sends what libraries write there elsewhere.
    console = Console(file=sys.stderr)
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def _peak() -> str:
    from ...runtimes.memory import peak_rss
    from .console import size

    peak = peak_rss()
    return f"peak {size(peak)}" if peak else ""
