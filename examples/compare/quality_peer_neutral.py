"""Logits of an artifact's graph as the gate runs it, on a machine that can't run its engine."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import quality_pipe

from llmc.compiler.gate.verify import open_checked
from llmc.runtimes.engines.batch import Batch


class NeutralLogits:
    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        self.version = f"{version('llmc')} (onnxruntime {version('onnxruntime')})"
        self._engine = open_checked(folder)
        self.vocab_size = self._engine.spec.vocab_size

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self._engine.forward(Batch.one(tokens)).numpy()


if __name__ == "__main__":
    quality_pipe.serve(NeutralLogits)
