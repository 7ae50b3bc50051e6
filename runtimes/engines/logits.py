"""The output of an engine's forward call."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Logits(Protocol):
    """Logits of R tokens, on the device where the engine computed them; valid until its next call."""

    def numpy(self) -> np.ndarray:
        """Return the logits, float32 [R, V]."""
        ...

    def argmax(self) -> np.ndarray:
        """Return the token id with the largest logit, the lowest of several, int64 [R]; -1 if it is not finite."""
        ...

    def top_k(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids, int64 [R, k], and the values, float32 [R, k], of the largest logits, largest first."""
        ...


class HostLogits:
    """Logits in a numpy array; see `Logits`.

    Args:
        values: float32 [R, V].
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def numpy(self) -> np.ndarray:
        return self._values

    def argmax(self) -> np.ndarray:
        values = self._values
        best = values.argmax(1)
        return np.where(np.isfinite(values[np.arange(len(values)), best]), best, -1)

    def top_k(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, self._values.shape[1])
        ids = np.empty((len(self._values), k), np.int64)
        for best, values in zip(ids, self._values, strict=True):
            # All that are equal to the smallest, of which the lowest ids are taken.
            candidates = np.flatnonzero(values >= np.partition(values, -k)[-k])
            best[:] = candidates[np.argsort(-values[candidates], kind="stable")[:k]]
        return ids, np.take_along_axis(self._values, ids, 1)
