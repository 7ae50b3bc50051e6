"""One request in progress: its tokens, how many of them are cached, its sampler and its end."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ...errors import LlmcError, UsageError
from ..engines.spec import EngineSpec
from .request import Finished, Request, Token
from .sampling import Logprobs, Sampler
from .stopping import Decoder, Ending, FinishReason


class TokenSequence:
    """The tokens of a request, prompt and output.

    Attributes:
        id: the request's id.
        length: the number of tokens.
        held: how many of them are in the cache; all but the last while the sequence decodes.
        reused: how many of them were in the cache at the beginning.
        reached: the most positions that its slot held when the sequence got it, since the slot began at 0.
        restarted_at: `length` when the cached tokens were last given up; -1 if they never were.
        finish_reason: None until the last token.
    """

    def __init__(
        self, id: int, request: Request, spec: EngineSpec, eos_ids: Collection[int], decoder: Decoder | None
    ) -> None:
        params = request.params
        params.check_vocab(spec.vocab_size)
        if params.stop and decoder is None:
            raise LlmcError(
                "TOKENIZER_MISSING",
                "stop is set, but there is no tokenizer.",
                "Give a tokenizer, or use stop_token_ids.",
            )
        prompt = check_prompt(request.prompt, spec)
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
        room = spec.max_seq_len - len(prompt)
        self.id = id
        self.cache_key = request.cache_key
        self.length = self.prompt_length = len(prompt)
        self.held = self.reused = self.reached = 0
        self.restarted_at = -1
        self.finish_reason: FinishReason | None = None
        self.is_greedy = params.greedy and not params.changes_logits and not params.min_tokens
        self.is_greedy &= params.logprobs is None
        self._ids = np.empty(len(prompt) + min(params.max_tokens, room), np.int64)
        self._ids[: len(prompt)] = prompt
        self._sampler = Sampler(params, stop_ids)
        self._ending = Ending(params, stop_ids, room, decoder, prompt.tolist())

    @property
    def ids(self) -> np.ndarray:
        """Prompt and output, int64 [length]."""
        return self._ids[: self.length]

    def append_sampled(self, logits: np.ndarray) -> Token:
        """Sample the next token from logits [V] and append it."""
        prompt, output = self.ids[: self.prompt_length], self.ids[self.prompt_length :]
        token, logprobs = self._sampler.sample(logits, prompt, output)
        return self.append(token, logprobs)

    def append(self, token: int, logprobs: Logprobs | None = None) -> Token:
        """Append a token; `finish_reason` is set if it is the last one."""
        self._ids[self.length] = token
        self.length += 1
        text, self.finish_reason = self._ending.push(token)
        return Token(self.id, token, text, logprobs, self.finish_reason)

    def finished(self) -> Finished:
        assert self.finish_reason is not None
        output = self.length - self.prompt_length
        return Finished(self.id, self.finish_reason, self.prompt_length, output, self.reused)


def check_prompt(prompt: Sequence[int] | np.ndarray, spec: EngineSpec) -> np.ndarray:
    """Return a prompt as int64.

    Raises:
        UsageError: PROMPT_EMPTY, PROMPT_INVALID or PROMPT_TOO_LONG if an engine can't continue it.
    """
    if len(prompt) == 0:
        raise UsageError("PROMPT_EMPTY", "The prompt has no tokens.", "Give at least one token.")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= spec.vocab_size:
        raise UsageError(
            "PROMPT_INVALID",
            f"The prompt is not a list of token ids from 0 to {spec.vocab_size - 1}.",
            "Encode it with this model's tokenizer.",
        )
    if len(ids) >= spec.max_seq_len:
        raise UsageError(
            "PROMPT_TOO_LONG",
            f"The prompt has {len(ids)} tokens; prompt and output together may have {spec.max_seq_len}.",
            "Shorten the prompt, or compile with a larger --max-seq-len.",
        )
    return ids.astype(np.int64)
