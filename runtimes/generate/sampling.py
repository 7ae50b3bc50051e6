"""Sampling: from logits to the next token.

The steps run in this order, as in vLLM:

1. Add `logit_bias`.
2. Before `min_tokens`, ban the tokens that would end the output.
3. Apply `repetition_penalty` to the tokens of prompt and output: logits above 0 are divided by it, others multiplied.
4. Subtract `frequency_penalty` times a token's count in the output, and `presence_penalty` once if it occurs there.
5. `no_repeat_ngram_size` bans the tokens that would repeat an n-gram of prompt and output.
6. At temperature 0, take the largest logit, with ties the lowest token id. The other steps have no effect then.
7. Divide by `temperature`.
8. `min_p` keeps the tokens that are at least this probable relative to the most probable one.
9. `top_k` keeps this many tokens, and ties with the last of them.
10. `top_p` keeps the smallest set of top tokens whose mass reaches it, and ties with the last of them.

Log probabilities are the model's own, before all of these steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import LlmcError, UsageError

TokenIds = Sequence[int] | np.ndarray

# Tokens that are handled together where not every token counts.
_BLOCK = 256


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stop settings, named as in vLLM; greedy by default.

    The module docstring defines the penalties and filters.

    Attributes:
        max_tokens: the largest number of tokens to generate.
        temperature: 0 is greedy, 1 samples from the model's own distribution.
        top_k: 0 or -1 keeps all tokens.
        seed: makes a completion reproducible, independent of the batch.
        logprobs: return the log probability of each token, and of this many most probable ones.
        stop: strings that end the output; the output excludes them.
        stop_token_ids: tokens that end the output, in addition to the model's own.
        ignore_eos: continue after the model's own end tokens.
        min_tokens: generate at least this many tokens before the output may end.
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
        # As in vLLM, a single string means a list of one, and None an empty list.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check_number("max_tokens", int, "1 or more", lambda v: v >= 1)
        self._check_number("temperature", float, "0 or more", lambda v: v >= 0)
        self._check_number("top_p", float, "above 0 and at most 1", lambda v: 0 < v <= 1)
        self._check_number("top_k", int, "1 or more, or 0 for all tokens", lambda v: v >= -1)
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
            raise _invalid("stop", self.stop, "non-empty strings")
        if not all(_is_number(token, int) and token >= 0 for token in self.stop_token_ids):
            raise _invalid("stop_token_ids", self.stop_token_ids, "token ids: whole numbers, 0 or more")
        if not all(_is_number(t, int) and t >= 0 and _is_number(b, float) for t, b in self.logit_bias.items()):
            raise _invalid("logit_bias", self.logit_bias, "token ids, each with a finite number")

    def _check_number(self, name: str, kind: type, wanted: str, in_range: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not (_is_number(value, kind) and in_range(value)):
            raise _invalid(name, value, f"{'a whole number' if kind is int else 'a number'}, {wanted}")

    def check_vocab(self, vocab_size: int) -> None:
        """Raise SAMPLING_INVALID if a token id is outside the model's vocabulary."""
        for name in ("logit_bias", "stop_token_ids"):
            if outside := [token for token in getattr(self, name) if token >= vocab_size]:
                raise UsageError(
                    "SAMPLING_INVALID",
                    f"{name} has token ids outside the model's vocabulary: {outside}.",
                    f"Give token ids from 0 to {vocab_size - 1}.",
                )

    @property
    def greedy(self) -> bool:
        """True if the most probable token is always chosen."""
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """True if `process` has an effect without `banned` tokens."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
        )


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of the chosen token and of the `top` tokens, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def process(
    logits: np.ndarray, params: SamplingParams, prompt_ids: TokenIds, output_ids: TokenIds, banned: TokenIds = ()
) -> np.ndarray:
    """Apply steps 1 to 5 (biases, bans, penalties) to a float32 copy of logits [V].

    Args:
        banned: token ids that must not be chosen.
    """
    scores = np.array(logits, dtype=np.float32)
    prompt, output = np.asarray(prompt_ids, dtype=np.int64), np.asarray(output_ids, dtype=np.int64)
    for token, bias in params.logit_bias.items():
        scores[token] += np.float32(bias)
    scores[np.asarray(banned, dtype=np.int64)] = -np.inf
    if params.repetition_penalty != 1:
        # A repeated token is read and written several times with the same value, so the penalty applies once.
        history = np.concatenate([prompt, output])
        values, penalty = scores[history], np.float32(params.repetition_penalty)
        scores[history] = np.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty:
        np.subtract.at(scores, output, np.float32(params.frequency_penalty))
    if params.presence_penalty:
        scores[output] = scores[output] - np.float32(params.presence_penalty)
    if params.no_repeat_ngram_size:
        scores[_ngram_continuations(np.concatenate([prompt, output]), params.no_repeat_ngram_size)] = -np.inf
    return scores


def _ngram_continuations(history: np.ndarray, n: int) -> np.ndarray:
    """Return the tokens that followed earlier occurrences of the last n - 1 tokens."""
    if len(history) < n:
        return history[:0]
    windows = np.lib.stride_tricks.sliding_window_view(history, n)
    return windows[(windows[:, :-1] == history[len(history) - n + 1 :]).all(axis=1), -1]


class Sampler:
    """Samples the tokens of one completion, with its own random state.

    Args:
        stop_ids: tokens that end the output; banned before `min_tokens`.
        random: source of random numbers; by default a generator seeded with `params.seed`.
    """

    def __init__(
        self, params: SamplingParams, stop_ids: Collection[int] = (), *, random: np.random.Generator | None = None
    ) -> None:
        self.params = params
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._random = np.random.default_rng(params.seed) if random is None else random
        self._keeps_all = params.top_k < 1 and params.min_p == 0 and params.top_p == 1

    def sample(
        self, logits: np.ndarray, prompt_ids: TokenIds = (), output_ids: TokenIds = ()
    ) -> tuple[int, Logprobs | None]:
        """Return the next token for logits [V]; with `params.logprobs`, also Logprobs."""
        scores = self._scores(logits, prompt_ids, output_ids)
        if self.params.greedy:
            token = int(scores.argmax())
            _check_scores(scores[token])
        else:
            token = self._choose_of_all(scores) if self._keeps_all else self.choose(*self._candidates(scores))
        return token, None if self.params.logprobs is None else _logprobs(logits, token, self.params.logprobs)

    def probabilities(self, logits: np.ndarray, prompt_ids: TokenIds = (), output_ids: TokenIds = ()) -> np.ndarray:
        """Distribution that `sample` draws from, float64 [V]; one-hot if greedy."""
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
        """Draw one of `tokens` with probability proportional to `weights`."""
        sums = weights.cumsum()
        index = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        # If rounding makes the product equal to the total, the last token with a nonzero weight is drawn.
        return int(tokens[min(index, np.searchsorted(sums, sums[-1]))])

    def _choose_of_all(self, scores: np.ndarray) -> int:
        """Draw a token if no filter removes any."""
        best = scores.max()
        _check_scores(best)
        weights = _weights(scores, best, self.params.temperature)
        # First a block, then a token in it: cumulative sums of all weights would cost more than all other steps.
        edges = np.arange(0, len(weights), _BLOCK)
        block = self.choose(edges, np.add.reduceat(weights, edges).astype(np.float64))
        tokens = np.arange(block, min(block + _BLOCK, len(weights)))
        return self.choose(tokens, weights[tokens].astype(np.float64))

    def _scores(self, logits: np.ndarray, prompt_ids: TokenIds, output_ids: TokenIds) -> np.ndarray:
        early = len(output_ids) < self.params.min_tokens
        if not (early or self.params.changes_logits):
            return logits
        banned = self._stop_ids[self._stop_ids < len(logits)] if early else ()
        return process(logits, self.params, prompt_ids, output_ids, banned)

    def _candidates(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Apply steps 7 to 10; return the kept tokens and their probabilities, float64."""
        params = self.params
        best = scores.max()
        _check_scores(best)
        total = None
        if 0 < params.top_k < len(scores):
            tokens = _at_least_kth(scores, params.top_k)
        elif params.min_p:
            # The best token has weight 1, so a smaller weight than half of min_p is never kept.
            tokens = np.flatnonzero(scores >= best + params.temperature * (math.log(params.min_p) - math.log(2)))
        elif params.top_p < 1:
            tokens, total = _nucleus_candidates(_weights(scores, best, params.temperature), params.top_p)
        else:
            tokens = np.arange(len(scores))
        # The exponents are at most 0, so exp can't overflow even at a tiny temperature.
        weights = np.exp((scores[tokens].astype(np.float64) - best) / params.temperature)
        if params.min_p:
            # min_p and top_k both keep top tokens, so their order doesn't matter.
            kept = weights >= params.min_p
            tokens, weights = tokens[kept], weights[kept]
        if params.top_p < 1:
            kept = _nucleus(weights, params.top_p * (weights.sum() if total is None else total))
            tokens, weights = tokens[kept], weights[kept]
        return tokens, weights / weights.sum()


def _weights(scores: np.ndarray, best: np.floating[Any], temperature: float) -> np.ndarray:
    """Return weights proportional to the probabilities of all tokens, float32; that of the best token is 1."""
    weights = scores - best
    # At the smallest temperatures, every other logit is infinitely far away.
    with np.errstate(over="ignore"):
        weights /= np.float32(max(temperature, 1e-30))
    return np.exp(weights, out=weights)


def _at_least_kth(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the tokens whose scores are at least the k-th largest."""
    whole = len(scores) // _BLOCK * _BLOCK
    tops = scores[:whole].reshape(-1, _BLOCK).max(1)
    if len(tops) < k:
        return np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    # k blocks have a score that is at least this, and few others have one: only those are sorted.
    candidates = np.flatnonzero(scores >= np.partition(tops, -k)[-k])
    values = scores[candidates]
    return candidates[values >= np.partition(values, -k)[-k]]


def _nucleus_candidates(weights: np.ndarray, top_p: float) -> tuple[np.ndarray, float]:
    """Return the tokens that may belong to the smallest set whose mass reaches `top_p`, and the total weight.

    Weights below (1 - top_p) / n of the total never belong to it: even n of them sum to less than the mass that may be
    left out. They are usually most of the vocabulary.
    """
    total = float(weights.sum())
    # float32 weights may be off by a millionth.
    return np.flatnonzero(weights >= 0.999 * (1 - top_p) * total / len(weights)), total


def _nucleus(weights: np.ndarray, mass: float) -> np.ndarray:
    """Mask of the smallest set of top tokens whose weights reach `mass`.

    Ties with the last token of the set are kept, too.
    """
    descending = np.sort(weights)[::-1]
    last = int(np.searchsorted(descending.cumsum(), mass))
    return weights >= descending[min(last, len(descending) - 1)]


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
            "Loosen penalties, bans and biases if they exclude every token; else check the artifact: llmc verify DIR",
        )


def _is_number(value: object, kind: type) -> bool:
    """True if `value` is a finite `kind`; a bool is no number, an int is a float."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if kind is int:
        return isinstance(value, (int, np.integer))
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def _invalid(name: str, value: object, wanted: str) -> UsageError:
    return UsageError("SAMPLING_INVALID", f"{name} is {value!r}.", f"Give {wanted}.")
