"""Run onnxruntime-genai through its Python `Generator`.

Past and present caches share one buffer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import protocol


class Genai:
    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        self.version = f"{version('onnxruntime-genai')} (onnxruntime {version('onnxruntime')})"
        self.weights = [folder / "model.onnx", folder / "model.onnx.data"]
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self._capacity = capacity
        self.reset()

    def reset(self) -> None:
        params = og.GeneratorParams(self._model)
        # A generator can't continue after an end-of-text token. A minimum length suppresses that token.
        params.set_search_options(do_sample=False, max_length=self._capacity, min_length=self._capacity)
        self._generator = og.Generator(self._model, params)

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        self._generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(count):
            self._generator.generate_next_token()
            on_token(int(self._generator.get_next_tokens()[0]))


if __name__ == "__main__":
    protocol.run("onnxruntime-genai", Genai)
