"""Pieces of prompts: as long as running sequences can wait."""

from __future__ import annotations

import pytest

from llmc.runtimes.generate.pacing import Pacing


def measured(step_s: float, token_s: float) -> Pacing:
    pacing = Pacing(longest=512)
    for _ in range(40):
        pacing.observe(4, 0, step_s)
        pacing.observe(4, 100, step_s + 100 * token_s)
    return pacing


def test_nobody_waits_for_a_long_piece() -> None:
    assert Pacing(longest=300).budget(0) == 300


@pytest.mark.parametrize(
    ("step_ms", "token_ms", "tokens"), [(10, 0.1, 60), (40, 0.5, 48), (10, 10, 6), (900, 0.1, 512)]
)
def test_a_piece_takes_less_time_than_a_step(step_ms: float, token_ms: float, tokens: int) -> None:
    assert measured(step_ms / 1000, token_ms / 1000).budget(4) == pytest.approx(tokens, abs=1)


def test_without_measurements_a_piece_is_short() -> None:
    assert 16 <= Pacing().budget(1) <= 64
    alone = Pacing()
    alone.observe(0, 500, 0.5)
    alone.observe(2, 0, 0.02)
    assert alone.budget(2) == pytest.approx(12, abs=1), "a prompt alone shows the time of a token, too"


def test_short_prompts_are_whole() -> None:
    pacing = Pacing()
    assert pacing.piece(40, 16, has_begun=False) == 40
    assert pacing.piece(40, 16, has_begun=True) == 16
    assert pacing.piece(400, 16, has_begun=False) == 16
    assert pacing.piece(9, 16, has_begun=True) == 9
    assert pacing.piece(40, 0, has_begun=False) == 0
