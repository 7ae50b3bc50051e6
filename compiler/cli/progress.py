"""What is being done and for how long, on stderr, for somebody who watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(phase: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the phase and its time if stderr is a terminal, else nothing; call it to name the next phase."""
    if not sys.stderr.isatty():
        yield lambda phase: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # Bound to this stderr: capture sends what libraries write there elsewhere.
    console = Console(file=sys.stderr)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(phase)
        yield lambda phase: bar.reset(task, description=phase)
