"""Logits of onnxruntime-genai's `Generator`.

The graph must return those of all tokens, not only of the last one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import quality_pipe
from peer_genai import Genai


class GenaiLogits(Genai):
    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        super().__init__(folder, threads, capacity)
        self.vocab_size = self.logits([0]).shape[1]

    def logits(self, tokens: list[int]) -> np.ndarray:
        self.reset()
        self._generator.append_tokens(np.array(tokens, dtype=np.int32))
        return self._generator.get_output("logits")[0]


if __name__ == "__main__":
    quality_pipe.serve(GenaiLogits)
