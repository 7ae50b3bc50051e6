"""Batches join the new tokens of sequences; inconsistent ones are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.errors import UsageError
from llmc.runtimes.engines.batch import Batch, NewTokens
from llmc.runtimes.engines.spec import EngineSpec

SPEC = EngineSpec(vocab_size=10, max_seq_len=8)
MIXED = Batch.of(NewTokens([1, 2, 3], 0, 2), NewTokens([4], 5, 0, "none"), NewTokens([5, 6], 1, 1, "all"))


def test_tokens_of_sequences_are_joined() -> None:
    assert MIXED.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert MIXED.lengths.tolist() == [3, 1, 2]
    assert MIXED.starts.tolist() == [0, 5, 1]
    assert MIXED.slots.tolist() == [2, 0, 1]
    assert MIXED.wanted.tolist() == [2, 4, 5]
    MIXED.check(SPEC, slots=3)


def test_one_sequence_and_one_token_of_each() -> None:
    one = Batch.one([7, 8], start=3, slot=1)
    assert (one.tokens.tolist(), one.starts.tolist(), one.slots.tolist(), one.wanted.tolist()) == (
        [7, 8],
        [3],
        [1],
        [0, 1],
    )
    step = Batch.step(np.array([7, 8]), np.array([3, 4]))
    assert (step.lengths.tolist(), step.slots.tolist(), step.wanted.tolist()) == ([1, 1], [0, 1], [0, 1])
    step.check(SPEC, slots=2)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"lengths": [3, 1]}, "BATCH_INVALID", "2 lengths, 3 starts"),
        ({"lengths": [3, 1, 3]}, "BATCH_INVALID", "for 6 tokens"),
        ({"lengths": [3, 3, 0]}, "BATCH_INVALID", "for 6 tokens"),
        ({"starts": [0, -1, 1]}, "BATCH_INVALID", "the start -1"),
        ({"slots": [2, 1, 1]}, "BATCH_INVALID", "one is twice"),
        ({"wanted": [2, 6]}, "BATCH_INVALID", "ascending"),
        ({"wanted": [-1]}, "BATCH_INVALID", "ascending"),
        ({"wanted": [2, 2]}, "BATCH_INVALID", "ascending"),
        ({"lengths": [], "tokens": [], "starts": [], "slots": [], "wanted": []}, "BATCH_INVALID", "no sequence"),
        ({"starts": [6, 5, 1]}, "SEQUENCE_TOO_LONG", "9 tokens; this engine has room for 8"),
        ({"tokens": [1, 2, 3, 4, 5, 10]}, "TOKEN_UNKNOWN", r"0\.\.9"),
        ({"tokens": [1, 2, -1, 4, 5, 6]}, "TOKEN_UNKNOWN", r"0\.\.9"),
        ({"slots": [3, 0, 1]}, "SLOT_CLOSED", "Slot 3 .* there are 3"),
        ({"slots": [-1, 0, 1]}, "SLOT_CLOSED", "Slot -1 "),
    ],
)
def test_what_can_not_run_is_refused(change: dict[str, Any], code: str, message: str) -> None:
    batch = replace(MIXED, **{name: np.array(value, np.int64) for name, value in change.items()})
    with pytest.raises(UsageError, match=message) as caught:
        batch.check(SPEC, slots=3)
    assert caught.value.code == code
