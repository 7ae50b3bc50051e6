"""Run an engine in its own environment and process.

The evaluation uses it like an engine of this process. The child writes one line of JSON with its version and vocabulary
size to stdout. For each line with a JSON list of tokens on stdin, it writes the float32 logits of each token.
Everything that libraries print goes to stderr. Peers import this file, so it uses the standard library and numpy only.
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

from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.spec import EngineSpec

_MAX_OUTPUT = 4000  # characters of a failed child's output to quote


class Logits(Protocol):
    """A loaded model that computes the logits of whole sequences."""

    version: str
    vocab_size: int

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Compute logits [S, V] of a sequence that starts at position 0.

        Entry i predicts the token after tokens[i].
        """


def serve(load: Callable[[Path, int, int], Logits]) -> None:
    """Run a child's main program.

    `load` gets the folder, the threads and the length of the longest sequence.
    """
    parser = argparse.ArgumentParser(description="Compute logits for lines of tokens. quality.py starts this script.")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--capacity", type=int, required=True)
    args = parser.parse_args()
    # C libraries print to descriptor 1, where their text would be read as logits. Redirect it to stderr.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        engine = load(args.model, args.threads, args.capacity)
        out.write(json.dumps({"version": engine.version, "vocab_size": engine.vocab_size}).encode() + b"\n")
        out.flush()
        for line in sys.stdin:
            tokens = json.loads(line)
            logits = np.ascontiguousarray(engine.logits(tokens), np.float32)
            if logits.shape != (len(tokens), engine.vocab_size):
                raise RuntimeError(f"the engine returned logits {logits.shape} for {len(tokens)} tokens")
            out.write(logits.data)
            out.flush()


class PipedEngine:
    """The parent's side: an engine with one slot.

    Every sequence starts at position 0.
    """

    slots = 1

    def __init__(self, command: Sequence[str | Path], capacity: int) -> None:
        self.runs = 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child)
        self._child = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        assert self._child.stdin and self._child.stdout
        self._to, self._from = self._child.stdin, self._child.stdout
        first = self._from.readline()
        if not first:
            raise self._died()
        header = json.loads(first)
        self.version: str = header["version"]
        self.spec = EngineSpec(header["vocab_size"], capacity)

    def open_slots(self, count: int) -> None:
        """Check that one slot is requested. Each sequence replaces its content."""
        if count != 1:
            raise RuntimeError(f"a piped engine has one slot, not {count}")

    def forward(self, batch: Batch) -> HostLogits:
        """Compute the logits of a whole sequence."""
        if len(batch.lengths) != 1 or batch.starts.any():
            raise RuntimeError("a piped engine runs whole sequences, one at a time")
        try:
            self._to.write(json.dumps(batch.tokens.tolist()).encode() + b"\n")
            self._to.flush()
        except BrokenPipeError:
            raise self._died() from None
        logits = np.empty((len(batch.tokens), self.spec.vocab_size), np.float32)
        missing = memoryview(logits).cast("B")
        while missing:
            count = self._from.readinto(missing)  # type: ignore[attr-defined]
            if not count:
                raise self._died()
            missing = missing[count:]
        self.runs += 1
        return HostLogits(logits[batch.wanted])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        raise RuntimeError("a piped engine has one slot")

    def close(self) -> None:
        """Kill the child, even if it is working."""
        self._child.kill()
        self._child.communicate()
        self._errors.close()

    def __enter__(self) -> PipedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _died(self) -> RuntimeError:
        status = self._child.wait()
        self._errors.seek(0)
        output = self._errors.read().decode(errors="replace")[-_MAX_OUTPUT:].strip()
        return RuntimeError(f"{output}\nfailed with status {status}: {' '.join(map(str, self._child.args))}")
