"""Serve requests with llama.cpp, in slots like those of its server with `--parallel N`.

Every `llama_decode` has the last token of each generating slot, and as much of the other slots' prompts as a batch of
2048 tokens has room for. A free slot takes the next request. The slots share one cache (`--kv-unified`); a cache for
each was slower. Other settings as in the speed measurement: micro-batch of 512, default flash attention, f16 cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as lib
import serving_protocol
from peer_llama import Llama
from serving_protocol import OnToken, Request, Server


@dataclass
class _Slot:
    """A request that is served.

    Attributes:
        pending: tokens that are not in the cache yet: the rest of the prompt, or the last generated token.
        cached: tokens in the cache.
        remaining: tokens to generate.
    """

    index: int
    pending: list[int]
    remaining: int
    cached: int = 0


class LlamaServer(Llama, Server):
    batch_size = 2048

    def __init__(self, folder: Path, threads: int, concurrency: int, longest: int) -> None:
        super().__init__(folder, threads, longest, sequences=concurrency)
        self.concurrency = concurrency
        self._batch = lib.llama_batch_init(self.batch_size, 0, 1)

    def serve(self, requests: Sequence[Request], on_token: OnToken) -> None:
        waiting = deque(enumerate(requests))
        slots: dict[int, _Slot] = {}  # by sequence id
        while waiting or slots:
            for sequence in range(self.concurrency):
                if waiting and sequence not in slots:
                    index, request = waiting.popleft()
                    slots[sequence] = _Slot(index, request.prompt, request.new_tokens)
            for sequence, token in self._step(slots).items():
                slot = slots[sequence]
                on_token(slot.index, token)
                slot.pending = [token]
                slot.remaining -= 1
                if not slot.remaining:
                    lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), sequence, -1, -1)
                    del slots[sequence]

    def _step(self, slots: dict[int, _Slot]) -> dict[int, int]:
        """Run one batch; return the next token of each slot without a rest of its prompt."""
        batch = self._batch
        batch.n_tokens = 0
        outputs = {}
        # Generating slots have one pending token. They come first, so that a long prompt does not delay them.
        for sequence, slot in sorted(slots.items(), key=lambda item: len(item[1].pending) > 1):
            part = slot.pending[: self.batch_size - batch.n_tokens]
            for token in part:
                i = batch.n_tokens
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, slot.cached, 1, sequence
                batch.logits[i] = 0
                slot.cached += 1
                batch.n_tokens += 1
            slot.pending = slot.pending[len(part) :]
            if not slot.pending:
                batch.logits[batch.n_tokens - 1] = 1
                outputs[sequence] = batch.n_tokens - 1
        if status := lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status} for {batch.n_tokens} tokens")
        return {sequence: self._next_token(output) for sequence, output in outputs.items()}


if __name__ == "__main__":
    serving_protocol.run("llama.cpp", LlamaServer)
