"""Logits in memory: the largest of each token."""

from __future__ import annotations

import numpy as np

from llmc.runtimes.engines.logits import HostLogits

VALUES = np.array([[0, 3, 3, 1], [-np.inf, -np.inf, -5, -6], [7, 1, 2, 8]], np.float32)


def test_the_first_of_equal_logits_is_the_largest() -> None:
    assert HostLogits(VALUES).argmax().tolist() == [1, 2, 3]
    assert HostLogits(VALUES).numpy() is VALUES


def test_what_is_not_finite_is_not_chosen() -> None:
    values = VALUES.copy()
    values[0, 2], values[1], values[2, 0] = np.nan, -np.inf, np.inf
    assert HostLogits(values).argmax().tolist() == [-1, -1, -1]


def test_the_largest_come_first() -> None:
    for count in (1, 3, 4, 9):
        ids, values = HostLogits(VALUES).top_k(count)
        assert ids.dtype == np.int64 and ids.shape == values.shape == (3, min(count, 4))
        assert ids[0].tolist() == [1, 2, 3, 0][:count]
        assert np.array_equal(values, -np.sort(-VALUES, 1)[:, :count])


def test_no_tokens_have_no_largest() -> None:
    assert HostLogits(VALUES[:0]).argmax().shape == (0,)
