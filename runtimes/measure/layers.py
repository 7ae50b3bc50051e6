"""How far what leaves each layer of an engine is from what leaves the same layer of a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from ...errors import LlmcError
from .windows import Window


class Watched(Protocol):
    """An engine that tells what leaves its layers; `WatchedEngine` is one.

    Attributes:
        before: the layer that a layer reads from, by the layer's name.
        unclear: why a layer has no such value.
    """

    @property
    def before(self) -> Mapping[str, str]: ...

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
        added: the same median for the part of the difference that what the layer reads does not have; None where that
            is no layer's.
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
        differences: dict[str, np.ndarray] = {}
        for layer, own in engine.values(window).items():
            total = sums.setdefault(layer, _Sums())
            known = [array for array in theirs.get(layer, []) if array.shape == own.shape]
            if len(known) != 1:
                total.why = total.why or _why(len(known), own, layer in theirs)
                continue
            rows = slice(window.first - 1, None)
            right = known[0][0, rows].reshape(len(window.targets), -1)
            differences[layer] = own[0, rows].reshape(right.shape) - right
            total.add(differences[layer], right, differences.get(engine.before.get(layer, "")))
    watch("layers", len(windows), len(windows))
    unclear = {**reference.unclear, **engine.unclear}
    names = sorted({*sums, *engine.unclear}, key=_in_order)
    layers = [LayerError(name, why=unclear[name]) if name in unclear else sums[name].as_error(name) for name in names]
    if not any(layer.error is not None for layer in layers):
        reason = next((f"{layer.name}: {layer.why}" for layer in layers), "none gives a row for each token")
        raise LlmcError(
            "LAYERS_UNLIKE",
            f"No layer of the artifact can be compared with the reference's ({reason}).",
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
        lengths, away = _lengths(reference), _lengths(difference)
        self.squares += float(np.square(away).sum())
        self.reference_squares += float(np.square(lengths).sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            self.shares.append(away / lengths)
            if before is not None and before.shape == difference.shape:
                self.added.append(_lengths(difference - before) / lengths)

    def as_error(self, name: str) -> LayerError:
        if self.why is not None:
            return LayerError(name, why=self.why)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = float(np.sqrt(np.float64(self.squares) / self.reference_squares))
        median = float(np.median(np.concatenate(self.shares)))
        if not np.isfinite([error, median]).all():
            return LayerError(name, why="what leaves it, or the reference's, is zero or not a number")
        return LayerError(name, error, median, float(np.median(np.concatenate(self.added))) if self.added else None)


def _lengths(rows: np.ndarray) -> np.ndarray:
    """Of vectors [N, D], in float64."""
    return np.sqrt(np.square(rows, dtype=np.float64).sum(1))


def _why(count: int, own: np.ndarray, is_known: bool) -> str:
    if not is_known:
        return "the reference has no such layer"
    return f"the reference's layer gives {count or 'no'} values {list(own.shape)}, not one"


def _in_order(name: str) -> tuple[tuple[int, str], ...]:
    """As numbers, where they are: layer 10 stands behind layer 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
