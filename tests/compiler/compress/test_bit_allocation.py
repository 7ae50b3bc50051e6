"""Which weights get more bits."""

from __future__ import annotations

from llmc.compiler.compress.bit_allocation import Candidate, by_worth, spare_until

LOSSES = {"a": 4.0, "b": 3.0, "c": 1.0, "d": 0.5}
NUMBERS = {"a": 400, "b": 100, "c": 100, "d": 50}


def test_worth_is_loss_for_each_number() -> None:
    assert [one.name for one in by_worth(LOSSES, NUMBERS)] == ["b", "a", "c", "d"]
    assert by_worth({"z": 1.0, "y": 1.0}, {"z": 5, "y": 5})[0].name == "y"


def test_no_more_than_needed() -> None:
    order = by_worth(LOSSES, NUMBERS)
    assert spare_until(order, 8.5) == []
    assert spare_until(order, 8.4) == ["b"]
    assert spare_until(order, 1.6) == ["b", "a"]
    assert spare_until(order, 0.0) == ["b", "a", "c", "d"]


def test_no_more_than_there_is_room_for() -> None:
    order = by_worth(LOSSES, NUMBERS)
    assert spare_until(order, 0.0, share=0.0) == []
    assert spare_until(order, 0.0, share=0.4) == ["b", "c", "d"]  # a is too large, those behind it are not
    assert spare_until([Candidate("x", 1.0, 10)], 0.0, share=1.0) == ["x"]
