"""Run OpenVINO GenAI through `LLMPipeline`.

Attention, cache and activation precision have their defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
import protocol


class _TokenStreamer(openvino_genai.StreamerBase):
    def __init__(self, on_token: Callable[[int], None]) -> None:
        super().__init__()
        self._on_token = on_token

    def write(self, tokens: int | list[int]) -> openvino_genai.StreamingStatus:
        for token in [tokens] if isinstance(tokens, int) else tokens:
            self._on_token(token)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVino:
    def __init__(self, folder: Path, threads: int, capacity: int) -> None:
        self.version = version("openvino-genai")
        self.weights = [folder / "openvino_model.xml", folder / "openvino_model.bin"]
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads)

    def reset(self) -> None:
        """Nothing to do: outside a chat, every call starts with an empty cache."""

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        ids = np.array([prompt], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        self._pipeline.generate(
            inputs, max_new_tokens=count, ignore_eos=True, do_sample=False, streamer=_TokenStreamer(on_token)
        )


if __name__ == "__main__":
    protocol.run("OpenVINO GenAI", OpenVino)
