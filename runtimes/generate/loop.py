"""Generation loop: prefill prompts one by one, decode all sequences together.

A finished sequence leaves the batch, and the next waiting prompt takes over its cache slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import LlmcError, UsageError
from ..engines.base import Engine
from .sampling import Logprobs, Sampler, SamplingParams
from .stopping import Decoder, Ending, FinishReason


@dataclass(frozen=True)
class NextToken:
    """One new token of one sequence.

    Attributes:
        prompt_index: index of the prompt that the token continues.
        text: text that can be shown now; the pieces of a sequence join to its full text.
        finish_reason: set on the last token of a sequence.
    """

    prompt_index: int
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
    """Continue prompts and yield each token as soon as it is sampled.

    Arguments are checked by this call, before the first token is requested. A sequence never has more tokens (prompt
    and output together) than the engine's `max_seq_len`.

    Args:
        params: one for all prompts, or one for each.
        eos_ids: the model's own end tokens.
        decoder: turns tokens into text; with None, texts are empty.
        chunk_size: the largest number of prompt tokens per prefill call.
        batch_size: the largest number of sequences that are decoded together.

    Raises:
        LlmcError: `PROMPT_EMPTY`, `PROMPT_TOO_LONG`, `PROMPT_INVALID`, `SAMPLING_INVALID`, `TOKENIZER_MISSING`.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UsageError(
            "SAMPLING_INVALID",
            f"There are {len(prompts)} prompts and {len(each)} sampling parameters.",
            "Give one SamplingParams for all prompts, or one for each.",
        )
    sequences = [
        _Sequence(index, _check_prompt(prompt, index, engine), one, engine, eos_ids, decoder)
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True))
    ]
    return _run(engine, sequences, chunk_size, min(batch_size, len(sequences)))


class _Sequence:
    """A prompt and its output so far, with its sampler and stop conditions."""

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
                "TOKENIZER_MISSING",
                "stop is set, but there is no tokenizer.",
                "Give a tokenizer, or use stop_token_ids.",
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

    def append_next(self, logits: np.ndarray) -> NextToken:
        """Sample the next token from logits [V] and append it."""
        prompt, output = self.ids[: self._prompt_length], self.ids[self._prompt_length : self.length]
        token, logprobs = self._sampler.sample(logits, prompt, output)
        self.ids[self.length] = token
        self.length += 1
        text, finish_reason = self._ending.push(token)
        return NextToken(self.index, token, text, logprobs, finish_reason)


def _check_prompt(prompt: Sequence[int], index: int, engine: Engine) -> np.ndarray:
    """Return the prompt as int64, or raise if it can't be continued."""
    if len(prompt) == 0:
        raise UsageError("PROMPT_EMPTY", f"Prompt {index} has no tokens.", "Give at least one token.")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= engine.vocab_size:
        raise UsageError(
            "PROMPT_INVALID",
            f"Prompt {index} is not a list of token ids from 0 to {engine.vocab_size - 1}.",
            "Encode it with this model's tokenizer.",
        )
    if len(ids) >= engine.max_seq_len:
        raise UsageError(
            "PROMPT_TOO_LONG",
            f"Prompt {index} has {len(ids)} tokens; prompt and output together may have {engine.max_seq_len}.",
            "Shorten the prompt, or compile with a larger --max-seq-len.",
        )
    return ids.astype(np.int64)


def _run(engine: Engine, sequences: list[_Sequence], chunk_size: int, slots: int) -> Iterator[NextToken]:
    if not sequences:
        return
    if engine.slots != slots:  # otherwise reuse the slots as they are: a prompt starts at 0 and overwrites them
        engine.open_slots(slots)
    tokens, starts = np.empty((slots, 1), dtype=np.int64), np.empty(slots, dtype=np.int64)
    slot_ids = np.empty(slots, dtype=np.int64)
    waiting, free, live = deque(sequences), list(range(slots)), list[_Sequence]()
    while waiting or live:
        while waiting and free:
            sequence = waiting.popleft()
            sequence.slot = free.pop(0)
            step = sequence.append_next(_prefill(engine, sequence, chunk_size))
            _keep_or_free(step, sequence, live, free)
            yield step
        if not live:
            continue
        count = len(live)
        for entry, sequence in enumerate(live):
            tokens[entry] = sequence.ids[sequence.length - 1]
            starts[entry] = sequence.length - 1
            slot_ids[entry] = sequence.slot
        logits = engine.forward(tokens[:count], starts[:count], slot_ids[:count], last_only=True)  # [B, 1, V]
        # Sample for every sequence before yielding: the logits buffer is the engine's and is lost at its next call.
        steps = [sequence.append_next(logits[entry, 0]) for entry, sequence in enumerate(live)]
        advanced, live = live, []
        for step, sequence in zip(steps, advanced, strict=True):
            _keep_or_free(step, sequence, live, free)
        yield from steps


def _keep_or_free(step: NextToken, sequence: _Sequence, live: list[_Sequence], free: list[int]) -> None:
    """Add an unfinished sequence to `live`, or the slot of a finished one to `free`."""
    if step.finish_reason is None:
        live.append(sequence)
    else:
        free.append(sequence.slot)


def _prefill(engine: Engine, sequence: _Sequence, chunk_size: int) -> np.ndarray:
    """Run the prompt chunk by chunk; return the logits [V] of its last token."""
    for start in range(0, sequence.length, chunk_size):
        chunk = sequence.ids[None, start : min(start + chunk_size, sequence.length)]
        logits = engine.forward(chunk, np.array([start]), np.array([sequence.slot]), last_only=True)
    return logits[0, 0]
