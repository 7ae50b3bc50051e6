"""From logits to the next token.

What is asked for happens in this order, which is vLLM's:

1. `logit_bias` is added.
2. Ids that would end the output are banned before `min_tokens`.
3. `repetition_penalty` over prompt and output: logits above 0 are divided by it, others multiplied.
4. `frequency_penalty` times how often the output holds a token, and `presence_penalty` if it does, are subtracted.
5. `no_repeat_ngram_size` bans what would complete an n-gram that prompt and output hold already.
6. Temperature 0 takes the largest logit, the first one of equals, and nothing below matters.
7. `temperature` divides.
8. `min_p` keeps what is at least that likely relative to the likeliest.
9. `top_k` keeps that many, and those equal to the last.
10. `top_p` keeps the likeliest until their sum reaches it, and those equal to the last.

Log probabilities are those of the model itself, before any of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import LlmcError

TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is drawn and where it ends; the names are vLLM's, the default is greedy.

    Attributes:
        max_tokens: the most tokens to make.
        temperature: 0 takes the likeliest token, 1 follows the model.
        top_k: keep that many tokens; 0 or -1 keeps all.
        seed: makes a completion repeatable, whatever it is batched with.
        logprobs: give the log probability of each token, and of that many likeliest ones.
        stop: texts that end the output, which excludes them.
        stop_token_ids: tokens that end the output, besides the model's own.
        ignore_eos: go on behind the model's own end tokens.
        min_tokens: no end before that many.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        # vLLM's users write one text for a list of one, and None for an empty list.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check_number("max_tokens", int, "1 or more", lambda v: v >= 1)
        self._check_number("temperature", float, "0 or more", lambda v: v >= 0)
        self._check_number("top_p", float, "above 0 and at most 1", lambda v: 0 < v <= 1)
        self._check_number("top_k", int, "1 or more, or 0 for all", lambda v: v >= -1)
        self._check_number("min_p", float, "0 to 1", lambda v: 0 <= v <= 1)
        self._check_number("repetition_penalty", float, "above 0", lambda v: v > 0)
        self._check_number("presence_penalty", float, "-2 to 2", lambda v: -2 <= v <= 2)
        self._check_number("frequency_penalty", float, "-2 to 2", lambda v: -2 <= v <= 2)
        self._check_number("no_repeat_ngram_size", int, "0 or more", lambda v: v >= 0)
        self._check_number("min_tokens", int, "0 to max_tokens", lambda v: 0 <= v <= self.max_tokens)
        if self.seed is not None:
            self._check_number("seed", int, "0 or more", lambda v: v >= 0)
        if self.logprobs is not None:
            self._check_number("logprobs", int, "0 or more", lambda v: v >= 0)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise _invalid("stop", self.stop, "texts that are not empty")
        if not all(_is(token, int) and token >= 0 for token in self.stop_token_ids):
            raise _invalid("stop_token_ids", self.stop_token_ids, "token ids")
        if not all(_is(t, int) and t >= 0 and _is(b, float) for t, b in self.logit_bias.items()):
            raise _invalid("logit_bias", self.logit_bias, "token ids, each with a finite number")

    def _check_number(self, name: str, kind: type, wanted: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not (_is(value, kind) and holds(value)):
            raise _invalid(name, value, f"{'a whole number' if kind is int else 'a number'}, {wanted}")

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse what names tokens that a model doesn't have."""
        for name in ("logit_bias", "stop_token_ids"):
            if outside := [token for token in getattr(self, name) if token >= vocab_size]:
                raise _invalid(name, outside, f"token ids below the model's vocabulary size, {vocab_size}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether `process` does anything; what `min_tokens` bans is the sampler's to know."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
        )


@dataclass(frozen=True)
class Logprobs:
    """The log probability of a chosen token, and of the likeliest ones, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def process(
    logits: np.ndarray, params: SamplingParams, prompt_ids: TokenIds, output_ids: TokenIds, banned: TokenIds = ()
) -> np.ndarray:
    """Logits [V] with biases, penalties and bans applied: steps 1 to 5, in float32, on a copy.

    Args:
        banned: ids that may not be next.
    """
    scores = np.array(logits, dtype=np.float32)
    prompt, output = np.asarray(prompt_ids, dtype=np.int64), np.asarray(output_ids, dtype=np.int64)
    for token, bias in params.logit_bias.items():
        scores[token] += np.float32(bias)
    scores[np.asarray(banned, dtype=np.int64)] = -np.inf
    if params.repetition_penalty != 1:
        # A token held twice is read and written twice, with the same values.
        held = np.concatenate([prompt, output])
        values, penalty = scores[held], np.float32(params.repetition_penalty)
        scores[held] = np.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty:
        np.subtract.at(scores, output, np.float32(params.frequency_penalty))
    if params.presence_penalty:
        scores[output] = scores[output] - np.float32(params.presence_penalty)
    if params.no_repeat_ngram_size:
        scores[_completing(np.concatenate([prompt, output]), params.no_repeat_ngram_size)] = -np.inf
    return scores


def _completing(history: np.ndarray, n: int) -> np.ndarray:
    """The tokens that stood behind earlier occurrences of the last n - 1."""
    if len(history) < n:
        return history[:0]
    windows = np.lib.stride_tricks.sliding_window_view(history, n)
    return windows[(windows[:, :-1] == history[len(history) - n + 1 :]).all(axis=1), -1]


class Sampler:
    """Draws one completion's tokens, with a random state of its own.

    Args:
        stop_ids: tokens that would end the output; banned before `min_tokens`.
    """

    def __init__(self, params: SamplingParams, stop_ids: Collection[int] = ()) -> None:
        self.params = params
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._random = np.random.default_rng(params.seed)

    def sample(
        self, logits: np.ndarray, prompt_ids: TokenIds = (), output_ids: TokenIds = ()
    ) -> tuple[int, Logprobs | None]:
        """The next token for logits [V], and its log probabilities if they are asked for."""
        scores = self._scores(logits, prompt_ids, output_ids)
        if self.params.greedy:
            token = int(scores.argmax())
            _check_scores(scores[token])
        else:
            token = self.choose(*self._candidates(scores))
        return token, None if self.params.logprobs is None else _logprobs(logits, token, self.params.logprobs)

    def probabilities(self, logits: np.ndarray, prompt_ids: TokenIds = (), output_ids: TokenIds = ()) -> np.ndarray:
        """The distribution that `sample` draws from, float64 [V]; greedy puts everything on one token."""
        scores = self._scores(logits, prompt_ids, output_ids)
        dense = np.zeros(len(scores))
        if self.params.greedy:
            token = scores.argmax()
            _check_scores(scores[token])
            dense[token] = 1
        else:
            tokens, probabilities = self._candidates(scores)
            dense[tokens] = probabilities
        return dense

    def choose(self, tokens: np.ndarray, weights: np.ndarray) -> int:
        """One of `tokens`, with probabilities in proportion to `weights`, by the sampler's random state."""
        sums = weights.cumsum()
        index = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        # Rounding may reach the sum itself; then it is the last token that has any weight.
        return int(tokens[min(index, np.searchsorted(sums, sums[-1]))])

    def _scores(self, logits: np.ndarray, prompt_ids: TokenIds, output_ids: TokenIds) -> np.ndarray:
        early = len(output_ids) < self.params.min_tokens
        if not (early or self.params.changes_logits):
            return logits
        banned = self._stop_ids[self._stop_ids < len(logits)] if early else ()
        return process(logits, self.params, prompt_ids, output_ids, banned)

    def _candidates(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be drawn and their probabilities: steps 7 to 10, float64."""
        params = self.params
        best = scores.max()
        _check_scores(best)
        tokens = np.arange(len(scores))
        if 0 < params.top_k < len(scores):
            tokens = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
        # Differences from the best can't overflow upwards, however small the temperature.
        weights = np.exp((scores[tokens].astype(np.float64) - best) / params.temperature)
        if params.min_p:
            # The best weighs 1. This and top_k both keep the likeliest, so either may come first.
            likely = weights >= params.min_p
            tokens, weights = tokens[likely], weights[likely]
        if params.top_p < 1:
            kept = _nucleus(weights, params.top_p)
            tokens, weights = tokens[kept], weights[kept]
        return tokens, weights / weights.sum()


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Which weights have betters that sum to less than `top_p` of all, as a mask."""
    total = weights.sum()
    # All n weights of at most (1 - top_p) / n of the total sum to no more than what may be left out, so that none
    # of them is inside: mostly they are nearly the whole vocabulary, which then needs no sorting.
    falling = np.sort(weights[weights >= (1 - top_p) * total / len(weights)])[::-1]
    inside = np.searchsorted(falling.cumsum(), top_p * total)
    return weights >= falling[min(inside, len(falling) - 1)]


def _logprobs(logits: np.ndarray, token: int, count: int) -> Logprobs:
    exact = logits.astype(np.float64)
    best = exact.max()
    exact -= best + math.log(np.exp(exact - best).sum())
    count = min(count, len(exact))
    top = np.argpartition(exact, -count)[-count:] if count else np.empty(0, dtype=np.int64)
    top = top[np.lexsort((top, -exact[top]))]
    return Logprobs(token, float(exact[token]), tuple((int(t), float(exact[t])) for t in top))


def _check_scores(best: np.floating[Any]) -> None:
    if not np.isfinite(best):
        raise LlmcError(
            "LOGITS_INVALID",
            f"No token can be chosen: the largest logit is {best}.",
            "If penalties, bans or biases leave no token, loosen them; else the engine is broken: run `llmc verify`.",
        )


def _is(value: object, kind: type) -> bool:
    """Whether a value is a number of that kind: bool is none, a whole number is also a float, nan and inf are none."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if kind is int:
        return isinstance(value, (int, np.integer))
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def _invalid(name: str, value: object, wanted: str) -> LlmcError:
    return LlmcError("SAMPLING_INVALID", f"{name} is {value!r}.", f"It must be {wanted}.")
