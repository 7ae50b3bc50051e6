"""The interface of an engine: tokens in, logits out, and a cache that is addressed by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ...errors import UsageError


class Engine(Protocol):
    """A compiled model with its caches.

    A cache slot holds one sequence. It stores no length: each call says how many of its positions count. A smaller
    start goes back to an earlier position, and a start of 0 begins a new sequence. The positions after a start are
    overwritten. Layers that keep only a window can go back by one position; an engine with such layers refuses more
    (`ROLLBACK_TOO_FAR`).

    Attributes:
        vocab_size: the number of logits of a token.
        max_seq_len: the number of positions of a slot.
        slots: the number of sequences that the caches are open for.
    """

    vocab_size: int
    max_seq_len: int
    slots: int

    def open_slots(self, count: int) -> None:
        """Make room for `count` sequences; the former content of the caches is lost."""

    def forward(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
    ) -> np.ndarray:
        """Run tokens after those that their slots hold.

        Args:
            tokens: int64 [B, S].
            starts: int64 [B], the number of positions that each sequence already holds.
            slots: int64 [B], the cache slot of each sequence, each at most once; by default 0 to B-1.
            last_only: return the logits of each sequence's last token only.

        Returns:
            Logits, float32 [B, S, V] or [B, 1, V], valid until the next call.

        Raises:
            LlmcError: `SEQUENCE_TOO_LONG` if a sequence would be longer than `max_seq_len`.
        """
        ...


@dataclass(frozen=True)
class KernelTime:
    """Time that one kernel took, over all its calls.

    Attributes:
        kernel: the runtime's name for it, such as an ONNX op type.
    """

    kernel: str
    calls: int
    ms: float


@runtime_checkable
class Profiles(Protocol):
    """An engine that can measure the time of its calls by kernel; not every engine can."""

    def profile(self, work: Callable[[], object], warm_up: Callable[[], object]) -> Sequence[KernelTime]:
        """Return the time by kernel of the `forward` calls that `work` makes, the longest first.

        Args:
            work: makes the calls that are measured.
            warm_up: makes calls that are not measured, before `work`.

        Raises:
            LlmcError: `PROFILE_TOO_LONG` if the runtime can't record that many calls.
        """
        ...


class LayerEngine(Protocol):
    """An engine that also returns the outputs of its layers.

    Attributes:
        layers: the names of the layers whose output is one value, in order.
        before: by a layer's name, the layer whose output it reads.
        unclear: why a layer has no output that could be returned; complete after the first call of `values`.
    """

    @property
    def layers(self) -> Sequence[str]: ...

    @property
    def before(self) -> Mapping[str, str]: ...

    @property
    def unclear(self) -> Mapping[str, str]: ...

    def values(self, tokens: np.ndarray) -> Mapping[str, np.ndarray]:
        """Run tokens [S] as a new sequence and return the output of each layer, [1, S, ...], by the layer's name."""
        ...


def check_fits(starts: np.ndarray, length: int, max_seq_len: int) -> None:
    """Refuse a forward call of `length` tokens per sequence that would exceed `max_seq_len`."""
    end = int(starts.max()) + length
    if end > max_seq_len:
        raise UsageError(
            "SEQUENCE_TOO_LONG",
            f"A sequence would hold {end} tokens; this engine has room for {max_seq_len}.",
            "Shorten it, or compile with a larger --max-seq-len.",
        )
