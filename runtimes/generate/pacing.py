"""Sizes of prompt pieces, from measured times: a piece must not delay running sequences for long."""

from __future__ import annotations

# A step with a piece should take this many times as long as one without. Single steps differ, so that the slowest of a
# hundred stay below twice the slowest without pieces.
_SLOWER = 1.6
# Weight of the newest measurement in a running mean.
_NEWEST = 0.2
# Tokens of a piece: fewer are inefficient on any hardware, as the weights are read once for each piece. Eight delayed
# streams of int8 artifacts, whose runs don't mix, by slightly too much.
_FEWEST = 6
# A prompt of at most this many tokens is not cut: it delays others by little, and once.
_WHOLE = 48


class Pacing:
    """Decides how many prompt tokens a step takes.

    Args:
        longest: the most prompt tokens of a step, also if no other sequence waits for it.
    """

    def __init__(self, longest: int = 512) -> None:
        self._longest = longest
        self._step_s: float | None = None  # a step without prompt tokens
        self._token_s: float | None = None  # one prompt token

    def budget(self, decoding: int) -> int:
        """Return how many prompt tokens the next step may take.

        Args:
            decoding: the number of sequences that wait for the step.
        """
        if not decoding:
            return self._longest
        if self._step_s is None or self._token_s is None:
            return _WHOLE
        return min(self._longest, max(_FEWEST, int((_SLOWER - 1) * self._step_s / self._token_s)))

    def piece(self, left: int, budget: int, has_begun: bool) -> int:
        """Return how many of a prompt's `left` tokens to take; 0 if the budget is used up.

        Args:
            has_begun: True if earlier steps took pieces of this prompt.
        """
        if budget <= 0:
            return 0
        return left if left <= _WHOLE and not has_begun else min(left, budget)

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from the time of a step."""
        if not prompt_tokens:
            self._step_s = _mean(self._step_s, seconds)
        elif self._step_s is not None or not decoding:
            rest = seconds - (self._step_s or 0.0) if decoding else seconds
            self._token_s = _mean(self._token_s, max(rest, 0.0) / prompt_tokens)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST * (new - old)
