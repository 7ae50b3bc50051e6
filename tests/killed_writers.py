"""Kill processes that write an artifact.

Usage: `killed_writers.py every|random OUT [--steps]`. It prints, as a JSON list, the identity of the artifact in OUT
after each killed writer; "" for none. `--steps` makes writers swap folders in two steps.

The writers are forks, so that hundreds run in seconds. This is a script of its own, because a test process with threads
or open models can't be forked safely.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from artifacts import OldLibrary, write

from llmc.runtimes.artifact.open import open_artifact
from llmc.runtimes.artifact.write import ArtifactWriter


def identity(folder: Path) -> str:
    """Check the artifact in `folder`; return the identity of its model."""
    return open_artifact(folder).model.identity


def killed_at_every_moment(out: Path) -> list[str]:
    """Kill writers before operation 0, 1, 2 ..., until one finishes."""
    left: list[str] = []
    for n in range(1000):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        write(out, "old")
        if not killed(out, n):
            assert identity(out) == "new"
            return left
        left.append(identity(out) if out.exists() else "")
        try:
            with ArtifactWriter(out):  # the next writer cleans up, and fails itself
                assert identity(out) in ("old", "new")
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert os.listdir(out.parent) == [out.name]
        else:
            raise AssertionError("the writer hid an error")
    raise AssertionError("every writer was killed")


def killed(out: Path, n: int) -> bool:
    """Write in a child that kills itself before its n-th filesystem operation.

    Return False if it finished before.
    """

    def work() -> None:
        remaining = n

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal remaining
            if event == "open" or event.startswith(("os.", "shutil.", "fcntl.", "ctypes.")):
                remaining -= 1
                if remaining == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write(out, "new")

    _, status = os.waitpid(child(work), 0)
    assert status in (0, signal.SIGKILL)
    return bool(status)


def killed_at_random(out: Path) -> list[str]:
    """Kill writers after short delays, while they write again and again."""

    def work() -> None:
        while True:
            write(out, "new")

    write(out, "old")
    left = []
    for delay in (0.0, 0.0005, 0.001, 0.002, 0.004):
        pid = child(work)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left.append(identity(out))
    write(out, "last")
    assert os.listdir(out.parent) == [out.name]
    return left


def child(work: Callable[[], None]) -> int:
    """Fork a process that runs `work` and exits; return its id."""
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
        ctypes.CDLL = OldLibrary  # type: ignore[assignment,misc]
    print(json.dumps({"every": killed_at_every_moment, "random": killed_at_random}[kind](Path(folder))))
