"""What every runtime is to the layers above it: tokens in, logits out, and a cache that is addressed by position."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...errors import LlmcError


class Engine(Protocol):
    """A compiled model with its caches.

    A cache slot holds one sequence. It has no length of its own: each call says how many positions of it count,
    so that going back is a smaller start, and a new sequence a start of 0. What lies behind a start is overwritten.
    Layers that keep a window only can go back by one; an engine with such layers refuses more, `ROLLBACK_TOO_FAR`.

    Attributes:
        vocab_size: the width of the logits.
        max_seq_len: the positions that a slot has room for.
        slots: how many sequences the caches are open for.
    """

    vocab_size: int
    max_seq_len: int
    slots: int

    def open_slots(self, count: int) -> None:
        """Make room for `count` sequences; what the caches held is lost."""

    def forward(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
    ) -> np.ndarray:
        """Run tokens behind what their slots hold.

        Args:
            tokens: int64 [B, S].
            starts: int64 [B], the positions that each row already holds.
            slots: int64 [B], the cache slot of each row, no two the same; 0 to B-1 where none are given.
            last_only: give the logits of the last token of each row only.

        Returns:
            Logits, float32 [B, S, V] or [B, 1, V], good until the next call.

        Raises:
            LlmcError: `SEQUENCE_TOO_LONG`, where a row would pass `max_seq_len`.
        """
        ...


def check_fits(starts: np.ndarray, length: int, max_seq_len: int) -> None:
    """Refuse a forward call of `length` tokens a row that would pass the end of a slot."""
    end = int(starts.max()) + length
    if end > max_seq_len:
        raise LlmcError(
            "SEQUENCE_TOO_LONG",
            f"A sequence would hold {end} tokens; this engine has room for {max_seq_len}.",
            "Shorten it, or compile with a larger --max-seq-len.",
        )
