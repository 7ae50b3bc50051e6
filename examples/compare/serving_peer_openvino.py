"""Serve requests with OpenVINO GenAI's `ContinuousBatchingPipeline`.

It adds prompts to running batches, in pieces where needed (`dynamic_split_fuse`). In this mode, the pipeline runs more
than `max_num_seqs` requests at once, so it gets a request only when fewer are running. Attention, precision of the
cache and of activations have their defaults.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import serving_protocol
from openvino_genai.py_openvino_genai import GenerationStatus
from serving_protocol import OnToken, Request, Server

_CACHE_GB = 1  # of keys and values; more than 16 of the longest requests need


class OpenVinoServer(Server):
    def __init__(self, folder: Path, threads: int, concurrency: int, longest: int) -> None:
        self.version = version("openvino-genai")
        self.weights = [folder / "openvino_model.xml", folder / "openvino_model.bin"]
        self.concurrency = concurrency
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = concurrency
        scheduler.cache_size = _CACHE_GB
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )

    def serve(self, requests: Sequence[Request], on_token: OnToken) -> None:
        waiting = deque(enumerate(requests))
        running: dict[int, Any] = {}  # handles, by index of the request
        while waiting or running:
            while waiting and len(running) < self.concurrency:
                index, request = waiting.popleft()
                running[index] = self._add(index, request)
            self._pipeline.step()
            for index, handle in list(running.items()):
                if handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            on_token(index, token)
                if handle.get_status() != GenerationStatus.RUNNING:
                    del running[index]

    def _add(self, index: int, request: Request) -> Any:
        ids = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
        config = openvino_genai.GenerationConfig(max_new_tokens=request.new_tokens, ignore_eos=True, do_sample=False)
        return self._pipeline.add_request(index, ids, config)


if __name__ == "__main__":
    serving_protocol.run("OpenVINO GenAI", OpenVinoServer)
