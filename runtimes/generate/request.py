"""Requests to the scheduler, and the events that answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import LlmcError
from .sampling import Logprobs, SamplingParams
from .stopping import FinishReason


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids.
        cache_key: requests with the same key reuse the cached positions of each other's common beginnings. None: the
            prompt is computed as a whole, so that its logits don't depend on earlier requests.
    """

    prompt: Sequence[int] | np.ndarray
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_key: str | None = None


@dataclass(frozen=True)
class Token:
    """A new token of a request.

    Attributes:
        request: the id that `Scheduler.add` returned.
        text: text that can be shown now; the pieces of a request join to its full text.
        finish_reason: set on the last token of a request.
    """

    request: int
    token: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Finished:
    """The end of a request, after its last token.

    Attributes:
        reused_tokens: tokens of the prompt whose positions were already in the cache.
    """

    request: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of a request that an error stopped; other requests go on."""

    request: int
    error: LlmcError


Event = Token | Finished | Failed
