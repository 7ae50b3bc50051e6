"""Calls of an engine with equally many new tokens of each sequence."""

from __future__ import annotations

import numpy as np

from llmc.runtimes.engines.base import Engine
from llmc.runtimes.engines.batch import Batch, NewTokens


def equal_batch(
    tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
) -> Batch:
    """Return a batch of tokens [B, S].

    Args:
        slots: by default 0 to B-1.
        last_only: want the logits of each sequence's last token only.
    """
    chosen = range(len(tokens)) if slots is None else slots
    wanted = "last" if last_only else "all"
    parts = zip(tokens, starts, chosen, strict=True)
    return Batch.of(*(NewTokens(one, int(start), int(slot), wanted) for one, start, slot in parts))


def forward(
    engine: Engine, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
) -> np.ndarray:
    """Run tokens [B, S]; return a copy of the logits, [B, S, V] or [B, 1, V]."""
    logits = engine.forward(equal_batch(tokens, starts, slots, last_only)).numpy()
    return logits.reshape(len(tokens), -1, logits.shape[-1]).copy()
