"""Text generation with one class: an engine, its tokenizer and the decode loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...errors import LlmcError, UsageError
from ..engines.base import Engine
from .loop import NextToken, generate
from .sampling import Logprobs, SamplingParams
from .stopping import FinishReason
from .tokenizer import Message, Tokenizer, read_eos_ids

Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or a conversation."""


@dataclass(frozen=True)
class Stats:
    """Token counts and times of a completion.

    Attributes:
        ttft_s: seconds from the call to the first token, including the wait for other prompts.
        decode_s: seconds from the first token to the last.
        tokens_per_s: decode speed, counting the tokens after the first; 0 if there are none.
    """

    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Completion:
    """The generated continuation of one prompt.

    Attributes:
        text: excludes the end token and the stop string.
        token_ids: include the end token.
        finish_reason: `stop` at an end token, stop token or stop string; `length` at `max_tokens`; `max_seq_len` when
            the engine's cache is full.
        logprobs: one per token; None unless `SamplingParams.logprobs` is set.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[Logprobs] | None
    stats: Stats


class LLM:
    """A model that generates text, for one caller at a time.

    Args:
        model: the folder of an artifact, or an engine.
        tokenizer: defaults to the artifact's. Without a tokenizer, prompts must be token ids and texts are empty.
        threads: threads of an artifact's engine; by default the engine decides.
        batch_size: the largest number of prompts that are decoded together.
    """

    def __init__(
        self,
        model: str | Path | Engine,
        tokenizer: Tokenizer | None = None,
        *,
        threads: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self._eos_ids: tuple[int, ...] = ()
        if isinstance(model, (str, Path)):
            from ..engines.load import load

            self.engine: Engine = load(model, threads=threads)
            folder = Path(model)
            if tokenizer is None and (folder / "tokenizer.json").is_file():
                tokenizer = Tokenizer(folder)
            self._eos_ids = read_eos_ids(folder)
        else:
            self.engine = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        if tokenizer is not None:
            self._eos_ids = tokenizer.eos_ids
        self._current_call = object()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
    ) -> list[Completion]:
        """Continue one prompt or several.

        Args:
            prompts: texts, token ids, or conversations (lists of messages).
            params: one for all prompts, or one for each; greedy by default.
            chat: wrap each text as a user message in the chat template.
        """
        started = time.perf_counter()
        ids = [self._encode(prompt, chat) for prompt in _as_list(prompts)]
        outputs = [_Output(len(one)) for one in ids]
        for step in self._steps(ids, params):
            outputs[step.prompt_index].add(step, time.perf_counter())
        return [output.completion(started) for output in outputs]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = False) -> Iterator[str]:
        """Continue a prompt and yield its text piece by piece.

        The caller may stop reading at any time.

        Raises:
            LlmcError: `STREAM_SUPERSEDED` while reading, if another call has used the engine since.
        """
        if self.tokenizer is None:
            raise _no_tokenizer()
        steps = self._steps([self._encode(prompt, chat)], params)
        return (step.text for step in steps if step.text)

    def _steps(
        self, ids: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Iterator[NextToken]:
        chosen = SamplingParams() if params is None else params
        steps = generate(self.engine, ids, chosen, self._eos_ids, self.tokenizer, batch_size=self.batch_size)
        return self._guard(steps)

    def _guard(self, steps: Iterator[NextToken]) -> Iterator[NextToken]:
        """Yield the steps; fail if another call overwrites the caches before the last."""
        call = self._current_call = object()
        for step in steps:
            yield step
            if self._current_call is not call and step.finish_reason is None:
                raise UsageError(
                    "STREAM_SUPERSEDED",
                    "Another call has used the engine since this stream began.",
                    "Read a stream to its end before the next call, or open a second LLM.",
                )

    def _encode(self, prompt: Prompt, chat: bool) -> list[int]:
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            if chat:
                raise UsageError(
                    "PROMPT_INVALID", "chat is set, but the prompt is token ids.", "Give text, or leave chat out."
                )
            return cast("list[int]", prompt)
        if self.tokenizer is None:
            raise _no_tokenizer()
        if isinstance(prompt, str) and not chat:
            return self.tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.encode(self.tokenizer.chat(cast("list[Message]", messages)), add_special_tokens=False)


class _Output:
    """Collects the steps of one completion."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._steps: list[NextToken] = []
        self._first = self._last = 0.0

    def add(self, step: NextToken, now: float) -> None:
        self._first, self._last = self._first if self._steps else now, now
        self._steps.append(step)

    def completion(self, started: float) -> Completion:
        decode_s = self._last - self._first
        count = len(self._steps)
        logprobs = [step.logprobs for step in self._steps if step.logprobs is not None]
        return Completion(
            text="".join(step.text for step in self._steps),
            token_ids=[step.token for step in self._steps],
            finish_reason=cast(FinishReason, self._steps[-1].finish_reason),
            logprobs=logprobs or None,
            stats=Stats(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=count,
                ttft_s=self._first - started,
                decode_s=decode_s,
                tokens_per_s=(count - 1) / decode_s if decode_s else 0.0,
            ),
        )


def _as_list(prompts: Any) -> list[Prompt]:
    """Return a list of prompts; a token list or a conversation is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], (int, np.integer, dict)):
        return [prompts]
    return prompts


def _is_conversation(prompt: Any) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], dict)


def _no_tokenizer() -> LlmcError:
    return LlmcError(
        "TOKENIZER_MISSING",
        "Text needs a tokenizer, and this model has none.",
        "Put tokenizer.json into the artifact or pass `tokenizer`; `generate` also takes token ids.",
    )
