"""Phases are told when they begin and measured when they end."""

from __future__ import annotations

import time

import pytest

from llmc.compiler.phases import Phases


def test_phases() -> None:
    seen: list[tuple[str, int, int]] = []
    phases = Phases(lambda *event: seen.append(event))
    with phases("capture"):
        assert seen == [("capture", 0, 0)]
        time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), phases("write"):
        _ = 1 / 0
    assert [name for name, _, _ in seen] == ["capture", "write"]
    # What failed took no time that anybody asks for.
    assert list(phases.seconds) == list(phases.peak) == ["capture"]
    assert 0.02 <= phases.seconds["capture"] < 2
    assert phases.peak["capture"] > 1 << 20
