"""The cheapest choice of weights on more bits whose artifact, as it is measured, keeps a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .bit_allocation import Candidate

# Each trial writes an artifact and runs it on a text.
MOST_TRIALS = 7


@dataclass(frozen=True)
class Trial:
    """An artifact that was made and measured.

    Attributes:
        raised: how many of the candidates have more bits in it.
        measured: its divergence, with what it may be off by added.
    """

    raised: int
    measured: float


def find_cheapest(
    candidates: Sequence[Candidate], limit: float, measure: Callable[[int], float]
) -> tuple[Trial | None, list[Trial]]:
    """The trial with the fewest raised that stays under a limit, and all trials; None if even all raised don't.

    More raised is taken to be better. What their losses foretell chooses the trials, scaled by what was measured; and
    between one that keeps the limit and one that doesn't, on the line through both, until they are neighbours.

    Args:
        candidates: those that are worth it most first.
        measure: makes an artifact in which so many of them are raised and says its divergence.
    """
    left = [sum(one.loss for one in candidates[count:]) for count in range(len(candidates) + 1)]
    fails, keeps = -1, len(candidates) + 1
    trials: list[Trial] = []
    best: Trial | None = None
    worse: Trial | None = None
    guess = _first_under(left, limit)
    while len(trials) < MOST_TRIALS and keeps - fails > 1:
        trial = Trial(guess, measure(guess))
        trials.append(trial)
        if trial.measured <= limit:
            keeps, best = guess, trial
        else:
            fails, worse = guess, trial
        if fails == len(candidates):
            break
        if best and worse:
            # Something is left even if all are raised, which no candidate is to blame for.
            share = (limit - best.measured) / (worse.measured - best.measured)
            wanted = _first_under(left, left[keeps] + share * (left[fails] - left[keeps]))
        elif best is None and len(trials) >= 3:
            wanted = len(candidates)  # is it possible at all?
        else:
            wanted = _first_under(left, left[guess] * limit / max(trial.measured, 1e-12))
        guess = min(max(wanted, fails + 1), keeps - 1)
    return best, trials


def _first_under(left: Sequence[float], limit: float) -> int:
    return next((count for count, loss in enumerate(left) if loss <= limit), len(left) - 1)
