"""Run llmc through its engine.

There is one `forward` for the prompt and one for each token; numpy makes the greedy choice.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import protocol

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
        logits = self._engine.forward(np.array([tokens]), np.array([start]), last_only=True)  # [1, 1, V]
        return int(logits[0, -1].argmax())


if __name__ == "__main__":
    protocol.run("llmc", Llmc)
