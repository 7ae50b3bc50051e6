"""Search for the fewest weights with more bits that keep a measured limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .bit_allocation import Candidate

# Each trial builds an artifact and runs it on a text.
MOST_TRIALS = 7


@dataclass(frozen=True)
class Trial:
    """An artifact that was built and measured.

    Attributes:
        raised: the number of candidates that have more bits in it.
        measured: its divergence plus the uncertainty of the measurement, in nats per token.
    """

    raised: int
    measured: float


def find_smallest(
    candidates: Sequence[Candidate], limit: float, measure: Callable[[int], float]
) -> tuple[Trial | None, list[Trial]]:
    """Find the smallest number of raised candidates whose artifact keeps the limit.

    Returns the best trial, or None if none keeps the limit, and all trials. Raising more candidates is assumed never to
    increase the divergence. Each trial is chosen by the sum of the losses of candidates that are not raised, scaled by
    the last measurement. Once there is a trial on each side of the limit, the next one is interpolated linearly between
    both, until they are neighbours.

    Args:
        candidates: in the order in which they are raised.
        limit: the largest divergence, in nats per token.
        measure: builds an artifact in which the given number of candidates is raised, and returns its divergence.
    """
    losses = [sum(candidate.loss for candidate in candidates[count:]) for count in range(len(candidates) + 1)]
    too_few, enough = -1, len(candidates) + 1
    trials: list[Trial] = []
    best: Trial | None = None
    worse: Trial | None = None
    guess = _first_under(losses, limit)
    while len(trials) < MOST_TRIALS and enough - too_few > 1:
        trial = Trial(guess, measure(guess))
        trials.append(trial)
        if trial.measured <= limit:
            enough, best = guess, trial
        else:
            too_few, worse = guess, trial
        if too_few == len(candidates):
            break
        if best and worse:
            # Not proportional to the losses: some divergence remains even if all candidates are raised.
            share = (limit - best.measured) / (worse.measured - best.measured)
            wanted = _first_under(losses, losses[enough] + share * (losses[too_few] - losses[enough]))
        elif best is None and len(trials) >= 3:
            wanted = len(candidates)  # find out if the limit can be kept at all
        else:
            wanted = _first_under(losses, losses[guess] * limit / max(trial.measured, 1e-12))
        guess = min(max(wanted, too_few + 1), enough - 1)
    return best, trials


def _first_under(losses: Sequence[float], limit: float) -> int:
    """Return the first index whose loss is at most `limit`, or the last index."""
    return next((count for count, loss in enumerate(losses) if loss <= limit), len(losses) - 1)
