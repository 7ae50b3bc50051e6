"""Processes that use one calibration cache at a time: `cache_users.py together|rounds|killed|compile FOLDER [ARG]`.

They are forks of this process, which has no threads. It prints as JSON how each of them ended and how often each
result was computed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from llmc.compiler.compress.cache import CalibrationCache

USERS = 8
NAMES = [f"weight {number}" for number in range(12)]


def together(home: Path) -> list[int]:
    """Fork processes that need the same results at the same moment, and read them late."""
    start, go = os.pipe()

    def work() -> None:
        os.close(go)
        with CalibrationCache(home / "cache") as cache:
            kept = {"first": cache.keep("first", lambda: made(home, "first"))}
            os.read(start, 1)  # ends when the parent closes the pipe
            kept |= {name: cache.keep(name, lambda name=name: made(home, name)) for name in NAMES}
            for name, tensors in kept.items():
                assert torch.equal(tensors["a"].evaluate(), value(name))
            cache.clear()

    children = [fork(work) for _ in range(USERS)]
    time.sleep(0.2)
    os.close(go)
    return [wait(child) for child in children]


def rounds(home: Path) -> list[int]:
    """Fork processes that come and go: each uses the cache and clears it, again and again."""

    def work() -> None:
        for _ in range(30):
            with CalibrationCache(home / "cache") as cache:
                kept = {name: cache.keep(name, lambda name=name: made(home, name)) for name in NAMES[:3]}
                time.sleep(0.001)
                for name, tensors in kept.items():
                    assert torch.equal(tensors["a"].evaluate(), value(name))
                cache.clear()

    return [wait(child) for child in [fork(work) for _ in range(USERS)]]


def killed(home: Path) -> list[int]:
    """Kill a process while it computes a result that others wait for."""
    computing = home / "computing"

    def stuck() -> dict[str, torch.Tensor]:
        computing.touch()
        time.sleep(600)
        raise AssertionError("it was not killed")

    def work() -> None:
        with CalibrationCache(home / "cache") as cache:
            assert torch.equal(cache.keep("one", lambda: made(home, "one"))["a"].evaluate(), value("one"))
            cache.clear()

    first = fork(lambda: CalibrationCache(home / "cache").keep("one", stuck))
    while not computing.exists():
        time.sleep(0.01)
    others = [fork(work) for _ in range(2)]
    time.sleep(0.2)
    os.kill(first, signal.SIGKILL)
    return [wait(child) for child in [first, *others]]


def compile_(home: Path, model: str) -> list[int]:
    """Fork identical calibrated compilations."""
    from llmc.compiler.api import compile  # once, and not in each fork

    text = home / "text.txt"
    text.write_text("the sea is blue, and so is the sky. " * 40)

    def work(number: int) -> None:
        compile(
            model, home / f"out-{number}", quantize="int4", group_size=16,
            calib=text, calib_samples=3, calib_length=40, verify=False,
        )  # fmt: skip

    return [wait(child) for child in [fork(lambda number=number: work(number)) for number in range(3)]]


def made(home: Path, name: str) -> dict[str, torch.Tensor]:
    """Compute a result slowly, and note it."""
    with (home / "log").open("a") as log:
        log.write(f"{name}\n")
    time.sleep(0.005)
    return {"a": value(name)}


def value(name: str) -> torch.Tensor:
    return torch.arange(4096) + len(name) * int(name.rpartition(" ")[2]) if name in NAMES else torch.ones(3)


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    kind, folder, *arguments = sys.argv[1:]
    work = {"together": together, "rounds": rounds, "killed": killed, "compile": compile_}[kind]
    ended = work(Path(folder), *arguments)
    log = Path(folder) / "log"
    print(json.dumps({"ended": ended, "computed": Counter(log.read_text().splitlines()) if log.exists() else {}}))
