"""Run onnxruntime-genai through its Python `Generator`.

Past and present caches share one buffer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime_genai as og
import protocol


class Genai:
    model_options: ClassVar[dict[str, Any]] = {}  # replace entries of `model` in genai_config.json

    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        self.version = f"{version('onnxruntime-genai')} (onnxruntime {version('onnxruntime')})"
        self.weights = [folder / "model.onnx", folder / "model.onnx.data"]
        config = og.Config(str(folder))
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {**self.model_options, "decoder": decoder}}))
        self._model = og.Model(config)
        self._capacity = capacity
        self.reset()

    def reset(self) -> None:
        self._generator = self._start(1, self._capacity)

    def _start(self, sequences: int, length: int) -> og.Generator:
        """Return a generator for a batch of sequences that end at this length."""
        params = og.GeneratorParams(self._model)
        # A generator can't continue after an end-of-text token. A minimum length suppresses that token.
        params.set_search_options(do_sample=False, batch_size=sequences, max_length=length, min_length=length)
        return og.Generator(self._model, params)

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        self._generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(count):
            self._generator.generate_next_token()
            on_token(int(self._generator.get_next_tokens()[0]))


if __name__ == "__main__":
    protocol.run("onnxruntime-genai", Genai)
