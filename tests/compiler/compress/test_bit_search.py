"""The search for the cheapest artifact, over artifacts whose divergence is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmc.compiler.compress.bit_allocation import Candidate
from llmc.compiler.compress.bit_search import MOST_TRIALS, find_cheapest

CANDIDATES = [Candidate(f"w{i}", 0.1 * 0.9**i, 10) for i in range(40)]
FORETOLD = [sum(one.loss for one in CANDIDATES[i:]) for i in range(41)]


def cheapest(truth: Callable[[int], float], limit: float) -> int:
    return next(count for count in range(41) if truth(count) <= limit)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("limit", [0.6, 0.1, 0.03])
def test_the_cheapest_is_found(scale: float, limit: float) -> None:
    def truth(count: int) -> float:
        return scale * FORETOLD[count]

    best, trials = find_cheapest(CANDIDATES, limit, truth)
    if truth(40) > limit:
        assert best is None
        return
    assert best is not None and best.measured == truth(best.raised) <= limit
    assert best.raised == cheapest(truth, limit) and len(trials) <= MOST_TRIALS


def test_a_floor_that_no_candidate_is_to_blame_for() -> None:
    def truth(count: int) -> float:
        return 0.005 + FORETOLD[count]

    best, _ = find_cheapest(CANDIDATES, 0.05, truth)
    assert best is not None and best.measured <= 0.05 and best.raised <= cheapest(truth, 0.05) + 1


@pytest.mark.parametrize("power", [0.7, 1.0, 1.3])
def test_a_floor_that_is_half_the_limit(power: float) -> None:
    """The way back from all raised is no step by step: trials would be over before it comes to anything."""
    many = [Candidate(f"w{i}", 0.001 * 0.985**i, 10) for i in range(120)]
    left = [sum(one.loss for one in many[i:]) for i in range(121)]

    def truth(count: int) -> float:
        return 0.01 + (20 * left[count]) ** power / 20

    best, _ = find_cheapest(many, 0.02, truth)
    assert best is not None and best.measured <= 0.02
    assert best.raised <= next(count for count in range(121) if truth(count) <= 0.02) + 2


def test_out_of_reach() -> None:
    best, trials = find_cheapest(CANDIDATES, 0.001, lambda count: 0.01 + FORETOLD[count])
    assert best is None and trials[-1].raised == 40


def test_nothing_need_be_raised() -> None:
    best, trials = find_cheapest(CANDIDATES, 2.0, lambda count: FORETOLD[count])
    assert best is not None and best.raised == 0 and len(trials) == 1


def test_foretold_much_too_low() -> None:
    """Whatever is foretold, what counts is measured."""
    best, trials = find_cheapest(CANDIDATES, 0.5, lambda count: 1.0 if count < 37 else 0.4)
    assert best is not None and best.measured <= 0.5 and len(trials) <= MOST_TRIALS
