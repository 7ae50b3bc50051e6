"""No forward call passes the end of a slot."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.runtimes.engines.base import check_fits


def test_a_slot_can_be_filled_to_its_end() -> None:
    check_fits(np.array([3, 6]), 2, 8)


def test_the_longest_sequence_decides() -> None:
    with pytest.raises(LlmcError, match="would hold 9 tokens; this engine has room for 8") as caught:
        check_fits(np.array([3, 7]), 2, 8)
    assert caught.value.code == "SEQUENCE_TOO_LONG"
