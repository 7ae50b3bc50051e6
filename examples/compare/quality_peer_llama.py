"""Compute logits of llama.cpp through the C API of llama-cpp-python.

A sequence is one batch, without an added first token. Settings as in the speed measurement: default flash attention,
f16 cache.
"""

from __future__ import annotations

from pathlib import Path

import llama_cpp as lib
import numpy as np
import quality_pipe
from peer_llama import Llama


class LlamaLogits(Llama):
    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        super().__init__(folder, threads, capacity)
        self.vocab_size = self._vocab

    def logits(self, tokens: list[int]) -> np.ndarray:
        self.reset()
        count = len(tokens)
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        status = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {count} tokens")
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(count, self._vocab))


if __name__ == "__main__":
    quality_pipe.serve(LlamaLogits)
