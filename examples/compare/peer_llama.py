"""Run llama.cpp through the C API of llama-cpp-python.

There is one `llama_decode` for the prompt, and one for each token. Settings as in llama-bench: batch and micro-batch of
512, default flash attention, f16 cache, and logits of the last position only.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import llama_cpp as lib
import numpy as np
import protocol

_ERROR = 4  # GGML_LOG_LEVEL_ERROR


def _print_error(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class Llama:
    batch_size = 512

    def __init__(self, folder: Path, threads: int, capacity: int, sequences: int = 1) -> None:
        self.version = f"{lib.llama_version().decode()} (llama-cpp-python {version('llama-cpp-python')})"
        self.weights = [folder / "model.gguf"]
        lib.llama_backend_init()
        self._log = lib.llama_log_callback(_print_error)  # the C library does not keep the callback alive
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        self._model = lib.llama_model_load_from_file(str(self.weights[0]).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {self.weights[0]}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = capacity * sequences, sequences, True
        params.n_batch, params.n_ubatch = self.batch_size, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp can't make a context for {sequences} sequences of {capacity} tokens")
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def reset(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        for start in range(0, len(prompt), self.batch_size):
            token = self._decode(prompt[start : start + self.batch_size])
        on_token(token)
        for _ in range(count - 1):
            token = self._decode([token])
            on_token(token)

    def _decode(self, tokens: list[int]) -> int:
        ids = (lib.llama_token * len(tokens))(*tokens)  # the batch points to this array, so it must outlive the call
        if status := lib.llama_decode(self._context, lib.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode returned {status}")
        return self._next_token(-1)

    def _next_token(self, output: int) -> int:
        """Return the most probable token at a position of the last batch."""
        logits = lib.llama_get_logits_ith(self._context, output)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


if __name__ == "__main__":
    protocol.run("llama.cpp", Llama)
