"""Writers of artifacts that are killed, in a process of their own: `killed_writers.py every|random OUT [--steps]`.

They are forks, so that hundreds come and go in seconds; and a process that has threads or open models, as one that runs
tests has, can't be forked safely. Prints as JSON what stood there after each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from artifacts import write

from llmc.runtimes.artifact import write as artifact_writer
from llmc.runtimes.artifact.open import open_artifact
from llmc.runtimes.artifact.write import ArtifactWriter


def identity(folder: Path) -> str:
    return str(open_artifact(folder).model["identity"])


def killed_at_every_moment(out: Path) -> list[str]:
    """What is left by a writer that is killed before its first, second, third … touch of the filesystem."""
    found: list[str] = []
    for moment in range(1000):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        write(out, "old")
        if not killed(out, moment):
            assert identity(out) == "new"
            return found
        found.append(identity(out) if out.exists() else "")
        try:
            with ArtifactWriter(out):  # the next writer, which fails
                assert identity(out) in ("old", "new")
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert os.listdir(out.parent) == [out.name]
        else:
            raise AssertionError("the writer hid an error")
    raise AssertionError("a writer that is always killed")


def killed(out: Path, moment: int) -> bool:
    """Write in a child that kills itself at a moment; whether it came that far."""

    def work() -> None:
        left = moment

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event == "open" or event.startswith(("os.", "shutil.", "fcntl.", "ctypes.")):
                left -= 1
                if left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write(out, "new")

    _, status = os.waitpid(child(work), 0)
    assert status in (0, signal.SIGKILL)
    return bool(status)


def killed_at_random(out: Path) -> list[str]:
    """What is left by one that is killed by the clock, while it writes again and again."""

    def work() -> None:
        while True:
            write(out, "new")

    write(out, "old")
    found = []
    for delay in (0.0, 0.0005, 0.001, 0.002, 0.004):
        pid = child(work)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found.append(identity(out))
    write(out, "last")
    assert os.listdir(out.parent) == [out.name]
    return found


def child(work: Callable[[], None]) -> int:
    """A fork that does some work and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    kind, folder, *steps = sys.argv[1:]
    if steps:
        artifact_writer._exchange = lambda one, other: False
    print(json.dumps({"every": killed_at_every_moment, "random": killed_at_random}[kind](Path(folder))))
