"""The loop that makes tokens: prompts of any lengths go in one by one, then all rows advance together.

A row that has ended leaves the batch, and the next prompt that waits takes its cache slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import LlmcError
from ..engines.base import Engine
from .sampling import Logprobs, Sampler, SamplingParams
from .stopping import Decoder, Ending, FinishReason


@dataclass(frozen=True)
class NextToken:
    """One new token of one row.

    Attributes:
        row: which prompt it continues.
        text: what can be shown now; a row's pieces make up its text.
        finish_reason: set at a row's last token.
    """

    row: int
    token: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    eos_ids: Collection[int] = (),
    decoder: Decoder | None = None,
    *,
    chunk_size: int = 512,
    batch_size: int = 8,
) -> Iterator[NextToken]:
    """Continue prompts, and yield each token as it is made.

    What was asked for is checked here, before the first step is taken. A sequence never holds more tokens, prompt
    and output together, than the engine's `max_seq_len`.

    Args:
        params: for all prompts, or one each.
        eos_ids: the model's own end tokens.
        decoder: None makes tokens without text.
        chunk_size: the most prompt tokens that go in at once.
        batch_size: the most rows that advance together.

    Raises:
        LlmcError: `PROMPT_EMPTY`, `PROMPT_TOO_LONG`, `PROMPT_INVALID`, `SAMPLING_INVALID`, `TOKENIZER_MISSING`.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise LlmcError(
            "SAMPLING_INVALID",
            f"There are {len(prompts)} prompts and {len(each)} sampling parameters.",
            "Give one for all, or one for each.",
        )
    rows = [
        _Row(index, _checked(prompt, index, engine), one, engine, eos_ids, decoder)
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True))
    ]
    return _advance(engine, rows, chunk_size, min(batch_size, len(rows)))


class _Row:
    """A prompt, its output so far, and how it goes on."""

    def __init__(
        self,
        index: int,
        prompt: np.ndarray,
        params: SamplingParams,
        engine: Engine,
        eos_ids: Collection[int],
        decoder: Decoder | None,
    ) -> None:
        params.check_vocab(engine.vocab_size)
        if params.stop and decoder is None:
            raise LlmcError(
                "TOKENIZER_MISSING", "Stop strings need a tokenizer.", "Give one, or stop at tokens: stop_token_ids."
            )
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
        room = engine.max_seq_len - len(prompt)
        self.index = index
        self.slot = 0
        self.length = self._prompt_length = len(prompt)
        self.ids = np.empty(len(prompt) + min(params.max_tokens, room), dtype=np.int64)
        self.ids[: len(prompt)] = prompt
        self._sampler = Sampler(params, stop_ids)
        self._ending = Ending(params, stop_ids, room, decoder, prompt.tolist())

    def take(self, logits: np.ndarray) -> NextToken:
        """Choose the next token by logits [V]."""
        prompt, output = self.ids[: self._prompt_length], self.ids[self._prompt_length : self.length]
        token, logprobs = self._sampler.sample(logits, prompt, output)
        self.ids[self.length] = token
        self.length += 1
        text, finish_reason = self._ending.push(token)
        return NextToken(self.index, token, text, logprobs, finish_reason)


def _checked(prompt: Sequence[int], index: int, engine: Engine) -> np.ndarray:
    """A prompt as int64, refused where it can't be continued."""
    if len(prompt) == 0:
        raise LlmcError("PROMPT_EMPTY", f"Prompt {index} holds no token.", "Give at least one.")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= engine.vocab_size:
        raise LlmcError(
            "PROMPT_INVALID",
            f"Prompt {index} holds something else than token ids from 0 to {engine.vocab_size - 1}.",
            "Was it encoded by another model's tokenizer?",
        )
    if len(ids) >= engine.max_seq_len:
        raise LlmcError(
            "PROMPT_TOO_LONG",
            f"Prompt {index} holds {len(ids)} tokens; prompt and output together may hold {engine.max_seq_len}.",
            "Shorten it, or compile with a larger --max-seq-len.",
        )
    return ids.astype(np.int64)


def _advance(engine: Engine, rows: list[_Row], chunk_size: int, slots: int) -> Iterator[NextToken]:
    if not rows:
        return
    if engine.slots != slots:  # else they are used again as they are: a prompt starts at 0 and overwrites
        engine.open_slots(slots)
    tokens, starts = np.empty((slots, 1), dtype=np.int64), np.empty(slots, dtype=np.int64)
    places = np.empty(slots, dtype=np.int64)
    waiting, free, live = deque(rows), list(range(slots)), list[_Row]()
    while waiting or live:
        while waiting and free:
            row = waiting.popleft()
            row.slot = free.pop(0)
            step = row.take(_prefill(engine, row, chunk_size))
            _file(step, row, live, free)
            yield step
        if not live:
            continue
        count = len(live)
        for place, row in enumerate(live):
            tokens[place] = row.ids[row.length - 1]
            starts[place] = row.length - 1
            places[place] = row.slot
        logits = engine.forward(tokens[:count], starts[:count], places[:count], last_only=True)  # [B, 1, V]
        # All rows choose before any is shown: the logits are the engine's, and gone at its next call.
        steps = [row.take(logits[place, 0]) for place, row in enumerate(live)]
        advanced, live = live, []
        for step, row in zip(steps, advanced, strict=True):
            _file(step, row, live, free)
        yield from steps


def _file(step: NextToken, row: _Row, live: list[_Row], free: list[int]) -> None:
    """Put a row with those that go on, or its slot with those that are free."""
    if step.finish_reason is None:
        live.append(row)
    else:
        free.append(row.slot)


def _prefill(engine: Engine, row: _Row, chunk_size: int) -> np.ndarray:
    """Fill a row's slot with its prompt; logits [V] of the last token."""
    for start in range(0, row.length, chunk_size):
        chunk = row.ids[None, start : min(start + chunk_size, row.length)]
        logits = engine.forward(chunk, np.array([start]), np.array([row.slot]), last_only=True)
    return logits[0, 0]
