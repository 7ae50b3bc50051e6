"""An engine that runs in an environment and a process of its own, as one that the ruler can measure.

Over the standard streams of the child: first a line of JSON with its version and the width of its logits; then, for
each line with a JSON list of tokens, as many rows of float32 logits. What libraries print goes to stderr, whatever
stream they print to. Peers import this file: standard library and numpy only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

_SAID = 4000


class Logits(Protocol):
    """A loaded model that gives the logits of whole sequences."""

    version: str
    vocab_size: int

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [S, V] of a sequence that nothing stands before: row i is what follows tokens[: i + 1]."""


def serve(load: Callable[[Path, int, int], Logits]) -> None:
    """The main program of a child; `load` is given the folder, threads, and the tokens of the longest sequence."""
    parser = argparse.ArgumentParser(description="Answers lines of tokens with logits; quality.py starts it.")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--capacity", type=int, required=True)
    args = parser.parse_args()
    # C libraries print to descriptor 1, where a stray line would be taken for logits.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        engine = load(args.model, args.threads, args.capacity)
        out.write(json.dumps({"version": engine.version, "vocab_size": engine.vocab_size}).encode() + b"\n")
        out.flush()
        for line in sys.stdin:
            tokens = json.loads(line)
            rows = np.ascontiguousarray(engine.logits(tokens), np.float32)
            if rows.shape != (len(tokens), engine.vocab_size):
                raise RuntimeError(f"the engine gave logits {rows.shape} for {len(tokens)} tokens")
            out.write(rows.data)
            out.flush()


class PipedEngine:
    """The parent's side: an engine of one slot, sequences of which begin at position 0."""

    slots = 1

    def __init__(self, command: Sequence[str | Path], capacity: int) -> None:
        self.max_seq_len = capacity
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child)
        self._child = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )
        assert self._child.stdin and self._child.stdout
        self._to, self._from = self._child.stdin, self._child.stdout
        first = self._from.readline()
        if not first:
            raise self._died()
        header = json.loads(first)
        self.version: str = header["version"]
        self.vocab_size: int = header["vocab_size"]

    def open_slots(self, count: int) -> None:
        """There is one, and each sequence empties it."""
        if count != 1:
            raise RuntimeError(f"an engine behind a pipe has one slot, not {count}")

    def forward(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
    ) -> np.ndarray:
        """Logits [1, S, V] of a whole sequence."""
        if tokens.shape[0] != 1 or starts.any() or last_only:
            raise RuntimeError("an engine behind a pipe runs whole sequences, one at a time")
        try:
            self._to.write(json.dumps(tokens[0].tolist()).encode() + b"\n")
            self._to.flush()
        except BrokenPipeError:
            raise self._died() from None
        logits = np.empty((1, tokens.shape[1], self.vocab_size), np.float32)
        room = memoryview(logits).cast("B")
        while room:
            count = self._from.readinto(room)  # type: ignore[attr-defined]
            if not count:
                raise self._died()
            room = room[count:]
        return logits

    def close(self) -> None:
        """End the child, whatever it does."""
        self._child.kill()
        self._child.communicate()
        self._said.close()

    def __enter__(self) -> PipedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _died(self) -> RuntimeError:
        status = self._child.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")[-_SAID:].strip()
        return RuntimeError(f"{said}\nfailed with status {status}: {' '.join(map(str, self._child.args))}")
