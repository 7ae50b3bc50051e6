"""Logits of llmc's engine."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import quality_pipe

from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.load import load


class LlmcLogits:
    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        self.version = f"{version('llmc')} (onnxruntime {version('onnxruntime')})"
        self._engine = load(folder, threads=threads)
        self.vocab_size = self._engine.spec.vocab_size

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self._engine.forward(Batch.one(tokens)).numpy()


if __name__ == "__main__":
    quality_pipe.serve(LlmcLogits)
