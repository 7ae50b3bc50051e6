"""Bit allocation: the order of candidates, and how many are spared."""

from __future__ import annotations

from llmc.compiler.compress.bit_allocation import Candidate, by_sensitivity, choose_until

LOSSES = {"a": 4.0, "b": 3.0, "c": 1.0, "d": 0.5}
NUMBERS = {"a": 400, "b": 100, "c": 100, "d": 50}


def test_candidates_are_sorted_by_loss_per_element() -> None:
    assert [candidate.name for candidate in by_sensitivity(LOSSES, NUMBERS)] == ["b", "a", "c", "d"]
    assert by_sensitivity({"z": 1.0, "y": 1.0}, {"z": 5, "y": 5})[0].name == "y"


def test_no_more_are_spared_than_needed() -> None:
    order = by_sensitivity(LOSSES, NUMBERS)
    assert choose_until(order, 8.5) == []
    assert choose_until(order, 8.4) == ["b"]
    assert choose_until(order, 1.6) == ["b", "a"]
    assert choose_until(order, 0.0) == ["b", "a", "c", "d"]


def test_no_more_are_spared_than_the_budget_allows() -> None:
    order = by_sensitivity(LOSSES, NUMBERS)
    assert choose_until(order, 0.0, share=0.0) == []
    assert choose_until(order, 0.0, share=0.4) == ["b", "c", "d"]  # a exceeds the budget, those after it don't
    assert choose_until([Candidate("x", 1.0, 10)], 0.0, share=1.0) == ["x"]
