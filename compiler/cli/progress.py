"""Show the running phase and its time on stderr: drawn on a terminal, one line per phase in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


@contextmanager
def progress(phase: str) -> Iterator[Callable[[str, str], None]]:
    """Show phases without steps: a spinner with the time on a terminal.

    Call the result with the name of the phase that begins, and a detail that only a terminal shows.
    """
    if not sys.stderr.isatty():
        with _phase_lines(phase) as begin:

            def begin_phase(phase: str, detail: str) -> None:
                begin(phase)

            yield begin_phase
        return
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    with _on_stderr(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        task = bar.add_task(phase)

        def show(phase: str, detail: str) -> None:
            bar.reset(task, description=detail or phase)

        yield show


@contextmanager
def steps(phase: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show phases with steps: a bar with the time left and the peak of memory on a terminal.

    Call the result with a phase, the number of steps that are done, and the number of all; 0 and 0 if it has no steps.
    """
    if not sys.stderr.isatty():
        with _phase_lines(phase) as begin:
            yield lambda phase, done, total: begin(phase)
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


@contextmanager
def _phase_lines(phase: str) -> Iterator[Callable[[str], None]]:
    """Write a line for each phase, `llmc: capture ... 8.5 s`: the name when it begins, the seconds when it ends."""
    # Bound to this stderr: capture redirects what libraries write there.
    stderr, current, began = sys.stderr, phase, time.perf_counter()

    def write(text: str) -> None:
        stderr.write(text)
        stderr.flush()

    def begin(phase: str) -> None:
        nonlocal current, began
        if phase != current:
            now = time.perf_counter()
            write(f" {now - began:.1f} s\nllmc: {phase} ...")
            current, began = phase, now

    write(f"llmc: {phase} ...")
    try:
        yield begin
    finally:
        write(f" {time.perf_counter() - began:.1f} s\n")


def _on_stderr(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    # Bound to this stderr: capture redirects what libraries write there.
    console = Console(file=sys.stderr)
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def _peak() -> str:
    from ...runtimes.memory import peak_rss
    from .console import size

    peak = peak_rss()
    return f"peak {size(peak)}" if peak else ""
