"""Bit search on artifacts with invented divergences."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmc.compiler.compress.bit_allocation import Candidate
from llmc.compiler.compress.bit_search import MOST_TRIALS, find_smallest

CANDIDATES = [Candidate(f"w{i}", 0.1 * 0.9**i, 10) for i in range(40)]
LOSSES = [sum(candidate.loss for candidate in CANDIDATES[i:]) for i in range(41)]


def smallest_count(divergence: Callable[[int], float], limit: float) -> int:
    return next(count for count in range(41) if divergence(count) <= limit)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("limit", [0.6, 0.1, 0.03])
def test_the_smallest_count_is_found(scale: float, limit: float) -> None:
    def divergence(count: int) -> float:
        return scale * LOSSES[count]

    best, trials = find_smallest(CANDIDATES, limit, divergence)
    if divergence(40) > limit:
        assert best is None
        return
    assert best is not None and best.measured == divergence(best.raised) <= limit
    assert best.raised == smallest_count(divergence, limit) and len(trials) <= MOST_TRIALS


def test_divergence_that_no_candidate_causes() -> None:
    def divergence(count: int) -> float:
        return 0.005 + LOSSES[count]

    best, _ = find_smallest(CANDIDATES, 0.05, divergence)
    assert best is not None and best.measured <= 0.05 and best.raised <= smallest_count(divergence, 0.05) + 1


@pytest.mark.parametrize("power", [0.7, 1.0, 1.3])
def test_remaining_divergence_of_half_the_limit(power: float) -> None:
    """Reducing the count one by one from all raised would take too many trials."""
    many = [Candidate(f"w{i}", 0.001 * 0.985**i, 10) for i in range(120)]
    losses = [sum(candidate.loss for candidate in many[i:]) for i in range(121)]

    def divergence(count: int) -> float:
        return 0.01 + (20 * losses[count]) ** power / 20

    best, _ = find_smallest(many, 0.02, divergence)
    assert best is not None and best.measured <= 0.02
    assert best.raised <= next(count for count in range(121) if divergence(count) <= 0.02) + 2


def test_a_limit_that_cannot_be_kept() -> None:
    best, trials = find_smallest(CANDIDATES, 0.001, lambda count: 0.01 + LOSSES[count])
    assert best is None and trials[-1].raised == 40


def test_a_limit_that_is_kept_without_raising() -> None:
    best, trials = find_smallest(CANDIDATES, 2.0, lambda count: LOSSES[count])
    assert best is not None and best.raised == 0 and len(trials) == 1


def test_losses_that_are_much_too_low() -> None:
    """Measurements decide, even if they differ much from the losses."""
    best, trials = find_smallest(CANDIDATES, 0.5, lambda count: 1.0 if count < 37 else 0.4)
    assert best is not None and best.measured <= 0.5 and len(trials) <= MOST_TRIALS
