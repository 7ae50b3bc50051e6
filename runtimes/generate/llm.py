"""Text generation with one class: an engine, its tokenizer and the decode loop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...errors import LlmcError, UsageError
from ..engines.base import Engine
from .dispatcher import Dispatcher
from .request import Event, Failed, Finished, Request, Token
from .sampling import Logprobs, SamplingParams
from .scheduler import Scheduler
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
        scheduler = Scheduler(self.engine, batch_size=batch_size, eos_ids=self._eos_ids, decoder=tokenizer)
        self._dispatcher = Dispatcher(scheduler)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine; the model can't be used afterwards."""
        self.engine.close()

    def forget(self) -> None:
        """Forget the cached beginnings of conversations; call it after another use of the engine."""
        self._dispatcher.forget()

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
        outputs = self._add(_as_list(prompts), params, chat)
        for event in self._dispatcher.events(outputs):
            outputs[event.request].add(event)
        return [output.completion() for output in outputs.values()]

    async def generate_async(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
    ) -> list[Completion]:
        """Continue prompts as `generate` does; other tasks run while the engine computes.

        Calls of several tasks of one event loop share batches.
        """
        outputs = self._add(_as_list(prompts), params, chat)
        async for event in self._dispatcher.events_async(outputs):
            outputs[event.request].add(event)
        return [output.completion() for output in outputs.values()]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = False) -> Iterator[Token]:
        """Continue a prompt and yield each token as soon as it is generated.

        The caller may stop reading at any time. Several streams and other calls may take turns.
        """
        events = self._dispatcher.events(self._add([prompt], params, chat))
        return (token for event in events if (token := _token(event)))

    def stream_async(
        self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = False
    ) -> AsyncIterator[Token]:
        """Continue a prompt as `stream` does; other tasks run while the engine computes."""
        events = self._dispatcher.events_async(self._add([prompt], params, chat))
        return (token async for event in events if (token := _token(event)))

    def _add(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, chat: bool
    ) -> dict[int, _Output]:
        """Queue all prompts, or none if one is refused; return their outputs by request."""
        chosen = SamplingParams() if params is None else params
        each = [chosen] * len(prompts) if isinstance(chosen, SamplingParams) else list(chosen)
        if len(each) != len(prompts):
            raise UsageError(
                "SAMPLING_INVALID",
                f"There are {len(prompts)} prompts and {len(each)} sampling parameters.",
                "Give one SamplingParams for all prompts, or one for each.",
            )
        began = time.perf_counter()
        outputs: dict[int, _Output] = {}
        try:
            for prompt, one in zip(prompts, each, strict=True):
                # A conversation comes back with the next turn, whose prompt begins with this one.
                key = "chat" if chat or _is_conversation(prompt) else None
                outputs[self._dispatcher.add(Request(self.encode(prompt, chat), one, key))] = _Output(began)
        except LlmcError as error:
            self._dispatcher.cancel(outputs)
            if len(prompts) > 1:
                raise type(error)(error.code, f"Prompt {len(outputs)}: {error.what}", error.hint) from None
            raise
        return outputs

    def encode(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """Return the token ids of a prompt, as `generate` takes them.

        Args:
            chat: wrap a text as a user message in the chat template.
        """
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
    """Collects the events of one completion."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._tokens: list[Token] = []
        self._first = self._last = 0.0
        self._end: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._end = event
        elif token := _token(event):
            now = time.perf_counter()
            self._first, self._last = self._first if self._tokens else now, now
            self._tokens.append(token)

    def completion(self) -> Completion:
        assert self._end is not None
        decode_s = self._last - self._first
        count = len(self._tokens)
        logprobs = [event.logprobs for event in self._tokens if event.logprobs is not None]
        return Completion(
            text="".join(event.text for event in self._tokens),
            token_ids=[event.token for event in self._tokens],
            finish_reason=self._end.reason,
            logprobs=logprobs or None,
            stats=Stats(
                prompt_tokens=self._end.prompt_tokens,
                completion_tokens=count,
                ttft_s=self._first - self._began,
                decode_s=decode_s,
                tokens_per_s=(count - 1) / decode_s if decode_s else 0.0,
            ),
        )


def _token(event: Event) -> Token | None:
    """Return the event if it is a token; raise the error of a failure."""
    if isinstance(event, Failed):
        raise event.error
    return event if isinstance(event, Token) else None


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
