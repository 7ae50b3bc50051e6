"""Run llmc through its engine.

There is one `forward` for the prompt and one for each token; numpy makes the greedy choice.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import protocol

from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.load import load


class Llmc:
    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        self.version = f"{version('llmc')} (onnxruntime {version('onnxruntime')})"
        self.weights = sorted(folder.glob("*.onnx*"))
        self._engine = load(folder, threads=threads)
        self._engine.open_slots(1)

    def reset(self) -> None:
        """Nothing to do: a sequence that starts at position 0 ignores the previous one."""

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        token = self._forward(prompt, 0)
        on_token(token)
        for position in range(len(prompt), len(prompt) + count - 1):
            token = self._forward([token], position)
            on_token(token)

    def _forward(self, tokens: list[int], start: int) -> int:
        return int(self._engine.forward(Batch.one(tokens, start, logits="last")).argmax()[0])


if __name__ == "__main__":
    protocol.run("llmc", Llmc)
