"""Serve requests with onnxruntime-genai, in static batches.

Its `Engine` adds requests to a running batch only with paged attention, which it has for CUDA and WebGPU. On a CPU the
`Engine` makes batches of at most 4 requests, so this uses its `Generator`: batches of `concurrency` requests in their
order. A batch lasts until its longest request is complete. Tokens past the end of the others are not counted.

Prompts of a batch are padded on the right. With padding on the left, its attention does not skip the padding, and the
output differs from that of a single request.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import serving_protocol
from peer_genai import Genai
from serving_protocol import OnToken, Request, Server

_PAD = 3


class GenaiServer(Genai, Server):
    model_options: ClassVar[dict[str, Any]] = {"pad_token_id": _PAD}

    def __init__(self, folder: Path, threads: int, concurrency: int, longest: int) -> None:
        super().__init__(folder, threads, longest)
        self.concurrency = concurrency

    def serve(self, requests: Sequence[Request], on_token: OnToken) -> None:
        if any(_PAD in request.prompt for request in requests):
            raise RuntimeError(f"a prompt has the token {_PAD}, which the engine takes for padding")
        for start in range(0, len(requests), self.concurrency):
            self._serve_batch(start, requests[start : start + self.concurrency], on_token)

    def _serve_batch(self, start: int, batch: Sequence[Request], on_token: OnToken) -> None:
        width = max(len(request.prompt) for request in batch)
        steps = max(request.new_tokens for request in batch)
        prompts = np.full((len(batch), width), _PAD, dtype=np.int32)
        for prompt, request in zip(prompts, batch, strict=True):
            prompt[: len(request.prompt)] = request.prompt
        generator = self._start(len(batch), width + steps)
        generator.append_tokens(prompts.reshape(-1))
        for step in range(steps):
            generator.generate_next_token()
            for index, (token, request) in enumerate(zip(generator.get_next_tokens(), batch, strict=True), start):
                if step < request.new_tokens:
                    on_token(index, int(token))


if __name__ == "__main__":
    serving_protocol.run("onnxruntime-genai", GenaiServer)
