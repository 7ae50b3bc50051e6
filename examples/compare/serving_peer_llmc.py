"""Serve requests with llmc's scheduler.

The measurement is that of `llmc bench --workload`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import serving_protocol
from peer_llmc import Llmc
from serving_protocol import OnToken, Request, Served, Server

from llmc.runtimes.generate.request import Failed, Token
from llmc.runtimes.generate.request import Request as SchedulerRequest
from llmc.runtimes.generate.sampling import SamplingParams
from llmc.runtimes.generate.scheduler import Scheduler
from llmc.runtimes.measure.workload import Arrival, serve_workload


class LlmcServer(Llmc, Server):
    def __init__(self, folder: Path, threads: int, concurrency: int, longest: int) -> None:
        super().__init__(folder, threads, longest)
        self.concurrency = concurrency

    def measure(self, requests: Sequence[Request]) -> Served:
        arrivals = [Arrival(np.array(request.prompt), request.new_tokens) for request in requests]
        result = serve_workload(self._engine, arrivals, self.concurrency)
        return Served(result.tokens, result.seconds, 1000 * float(np.median(result.ttft_s)))

    def serve(self, requests: Sequence[Request], on_token: OnToken) -> None:
        scheduler = Scheduler(self._engine, batch_size=self.concurrency)
        indices = {}
        for index, request in enumerate(requests):
            params = SamplingParams(max_tokens=request.new_tokens, ignore_eos=True)
            indices[scheduler.add(SchedulerRequest(np.array(request.prompt), params))] = index
        while not scheduler.is_idle:
            for event in scheduler.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Token):
                    on_token(indices[event.request], event.token)


if __name__ == "__main__":
    serving_protocol.run("llmc", LlmcServer)
