"""How far what leaves each layer of an engine is from what leaves the same layer of a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import LlmcError
from .windows import Window


class Watched(Protocol):
    """An engine that tells what leaves its layers; `WatchedEngine` is one.

    Attributes:
        unclear: why a layer has no such value, by the layer's name.
    """

    @property
    def unclear(self) -> Mapping[str, str]: ...

    def values(self, window: Window) -> Mapping[str, np.ndarray]:
        """What leaves each layer for a window's tokens but the last, [1, S, ...], by the layers' names."""
        ...


@dataclass(frozen=True, eq=False)
class LayerReference:
    """What leaves the layers of a reference.

    Attributes:
        windows: of each window, by the layers' names. A model's layer may give several values: the one that flows on
            has the shape of the engine's.
        unclear: why a layer has none.
    """

    windows: Sequence[Mapping[str, Sequence[np.ndarray]]]
    unclear: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerError:
    """How far what leaves a layer is from the reference's; without numbers, `why` says the reason.

    Attributes:
        error: root mean square of the difference over all tokens, relative to that of the reference's values.
        median: of single tokens, each relative to its own values: a few tokens with huge ones don't hide the others.
        added: the same median for the part of the difference that the layer before does not have.
    """

    name: str
    error: float | None = None
    median: float | None = None
    added: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class LayerErrors:
    """Of all layers in order, over so many scored tokens."""

    layers: list[LayerError]
    tokens: int
    windows: int

    def as_dict(self) -> dict[str, Any]:
        """The layout under `per_layer` of `llmc eval --json`."""
        return asdict(self)


def measure_layers(
    engine: Watched,
    reference: LayerReference,
    windows: Sequence[Window],
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> LayerErrors:
    """Compare what leaves the layers, for the scored tokens of windows.

    Args:
        watch: told "layers", and how many windows are done.

    Raises:
        LlmcError: LAYERS_UNLIKE where there is no layer that can be compared.
    """
    sums: dict[str, _Sums] = {}
    for i, window in enumerate(windows):
        watch("layers", i, len(windows))
        theirs = reference.windows[i]
        before: np.ndarray | None = None
        for layer, own in engine.values(window).items():
            total = sums.setdefault(layer, _Sums())
            known = [array for array in theirs.get(layer, []) if array.shape == own.shape]
            if len(known) != 1:
                total.why = total.why or _why(len(known), own, layer in theirs)
                before = None
                continue
            rows = slice(window.first - 1, None)
            right = known[0][0, rows].reshape(len(window.targets), -1).astype(np.float64)
            difference = own[0, rows].reshape(right.shape) - right
            total.add(difference, right, before)
            before = difference
    watch("layers", len(windows), len(windows))
    unclear = {**reference.unclear, **engine.unclear}
    names = sorted({*sums, *engine.unclear}, key=_in_order)
    layers = [LayerError(name, why=unclear[name]) if name in unclear else sums[name].as_error(name) for name in names]
    if not any(layer.error is not None for layer in layers):
        raise LlmcError(
            "LAYERS_UNLIKE",
            f"No layer of the artifact can be compared with the reference's ({layers[0].name}: {layers[0].why}).",
            "Give the model that it was compiled from, or measure without --per-layer.",
        )
    return LayerErrors(layers, sum(len(window.targets) for window in windows), len(windows))


@dataclass
class _Sums:
    """Of one layer, window by window."""

    squares: float = 0.0
    reference_squares: float = 0.0
    shares: list[np.ndarray] = field(default_factory=list)
    added: list[np.ndarray] = field(default_factory=list)
    why: str | None = None

    def add(self, difference: np.ndarray, reference: np.ndarray, before: np.ndarray | None) -> None:
        fresh = difference if before is None or before.shape != difference.shape else difference - before
        lengths = np.linalg.norm(reference, axis=1)
        self.squares += float(np.square(difference).sum())
        self.reference_squares += float(np.square(reference).sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            self.shares.append(np.linalg.norm(difference, axis=1) / lengths)
            self.added.append(np.linalg.norm(fresh, axis=1) / lengths)

    def as_error(self, name: str) -> LayerError:
        if self.why is not None:
            return LayerError(name, why=self.why)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = float(np.sqrt(np.float64(self.squares) / self.reference_squares))
        median, added = (float(np.median(np.concatenate(parts))) for parts in (self.shares, self.added))
        if not np.isfinite([error, median, added]).all():
            return LayerError(name, why="what leaves it, or the reference's, is zero or not a number")
        return LayerError(name, error, median, added)


def _why(count: int, own: np.ndarray, is_known: bool) -> str:
    if not is_known:
        return "the reference has no such layer"
    return f"the reference's layer gives {count or 'no'} values {list(own.shape)}, not one"


def _in_order(name: str) -> tuple[tuple[int, str], ...]:
    """As numbers, where they are: layer 10 stands behind layer 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
