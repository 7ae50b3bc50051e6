"""The interface of an engine: new tokens in, logits out, and caches that are addressed by slot and position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from .batch import Batch
from .logits import Logits
from .spec import EngineSpec


class Engine(Protocol):
    """A compiled model with its caches.

    A cache slot holds one sequence. It stores no length: each call says how many of its positions count. A smaller
    start goes back to an earlier position, and a start of 0 begins a new sequence. The positions after a start are
    overwritten. Layers that keep only a window can go back by `spec.rollback` positions, from the furthest that the
    slot has held; an engine with such layers refuses more (`ROLLBACK_TOO_FAR`). The logits of a token depend on its own
    sequence only.

    A call that is refused changes nothing. After a call that failed or was interrupted, the slots of its batch hold
    the positions before its starts, or the engine refuses to continue from there (`ROLLBACK_TOO_FAR`); they can always
    begin a new sequence.

    Attributes:
        slots: the number of sequences that the caches are open for.
        runs: how often the engine has run a graph, to show how well calls use it.
    """

    spec: EngineSpec

    @property
    def slots(self) -> int: ...

    @property
    def runs(self) -> int: ...

    def open_slots(self, count: int) -> None:
        """Make room for `count` sequences. Slots that were open before keep their content."""

    def forward(self, batch: Batch) -> Logits:
        """Run new tokens after those that their slots hold; return the logits of the wanted ones.

        Raises:
            LlmcError: BATCH_INVALID, SEQUENCE_TOO_LONG, TOKEN_UNKNOWN, SLOT_CLOSED, ROLLBACK_TOO_FAR, ENGINE_CLOSED.
        """
        ...

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another one, so that both continue from there.

        The copy can go back as far as the original.

        Raises:
            LlmcError: SLOT_CLOSED or ENGINE_CLOSED.
        """

    def close(self) -> None:
        """Free graphs and caches. Calls after it are refused (`ENGINE_CLOSED`); a second `close` does nothing."""


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


@runtime_checkable
class ReportsRuns(Protocol):
    """An engine that reports each run of a graph; not every engine does.

    Attributes:
        around_run: called before a run with the number of new tokens of each of its sequences. The run takes place
            within the context that it returns. A caller may replace it, and puts the old one back afterwards.
    """

    around_run: Callable[[Sequence[int]], AbstractContextManager[object]]


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
