"""Per-layer output error of an engine against a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...errors import LlmcError
from ..engines.base import LayerEngine
from .windows import Window


@dataclass(frozen=True, eq=False)
class LayerReference:
    """Layer outputs of a reference.

    Attributes:
        windows: for each window, the output arrays of each layer, by layer. A model's layer can return several arrays:
            the one with the shape of the engine's layer output is compared.
        unclear: maps a layer without a usable output to the reason.
    """

    windows: Sequence[Mapping[str, Sequence[np.ndarray]]]
    unclear: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's output against the reference's.

    Attributes:
        error: root mean square of the difference over all tokens, relative to that of the reference's output.
        median: median over tokens of the difference, relative to the token's reference output. Unlike `error`, it is
            not dominated by a few tokens with huge values.
        added: the same median for the output difference minus the input difference, which is the part that this layer
            adds; None if the layer doesn't read another layer's output.
        why: the reason if there are no numbers.
    """

    name: str
    error: float | None = None
    median: float | None = None
    added: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class LayerErrors:
    """Errors of all layers in order, and the number of scored tokens and windows."""

    layers: list[LayerError]
    tokens: int
    windows: int

    def as_dict(self) -> dict[str, Any]:
        """Return the layout under `per_layer` of `llmc eval --json`."""
        return asdict(self)


def measure_layers(
    engine: LayerEngine,
    reference: LayerReference,
    windows: Sequence[Window],
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> LayerErrors:
    """Compare layer outputs at the scored tokens of windows.

    Args:
        watch: called with "layers", the number of finished windows and the number of all windows.

    Raises:
        LlmcError: LAYERS_UNLIKE if no layer can be compared.
    """
    sums: dict[str, _Sums] = {}
    for i, window in enumerate(windows):
        watch("layers", i, len(windows))
        expected = reference.windows[i]
        differences: dict[str, np.ndarray] = {}
        for layer, own in engine.values(window.tokens[:-1]).items():
            total = sums.setdefault(layer, _Sums())
            matching = [array for array in expected.get(layer, []) if array.shape == own.shape]
            if len(matching) != 1:
                total.why = total.why or _why(len(matching), own, layer in expected)
                continue
            scored = slice(window.first - 1, None)
            right = matching[0][0, scored].reshape(len(window.targets), -1)
            differences[layer] = own[0, scored].reshape(right.shape) - right
            total.add(differences[layer], right, differences.get(engine.before.get(layer, "")))
    watch("layers", len(windows), len(windows))
    unclear = {**reference.unclear, **engine.unclear}
    names = sorted({*sums, *engine.unclear}, key=_by_number)
    layers = [LayerError(name, why=unclear[name]) if name in unclear else sums[name].as_error(name) for name in names]
    if not any(layer.error is not None for layer in layers):
        reason = next((f"{layer.name}: {layer.why}" for layer in layers), "no layer has an output for each token")
        raise LlmcError(
            "LAYERS_UNLIKE",
            f"No layer of the artifact can be compared with the reference ({reason}).",
            "Give the model that the artifact was compiled from, or leave out --per-layer.",
        )
    return LayerErrors(layers, sum(len(window.targets) for window in windows), len(windows))


@dataclass
class _Sums:
    """Running sums of one layer's errors over windows."""

    squares: float = 0.0
    reference_squares: float = 0.0
    shares: list[np.ndarray] = field(default_factory=list)
    added: list[np.ndarray] = field(default_factory=list)
    why: str | None = None

    def add(self, difference: np.ndarray, reference: np.ndarray, before: np.ndarray | None) -> None:
        norms, distances = _norms(reference), _norms(difference)
        self.squares += float(np.square(distances).sum())
        self.reference_squares += float(np.square(norms).sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            self.shares.append(distances / norms)
            if before is not None and before.shape == difference.shape:
                self.added.append(_norms(difference - before) / norms)

    def as_error(self, name: str) -> LayerError:
        if self.why is not None:
            return LayerError(name, why=self.why)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = float(np.sqrt(np.float64(self.squares) / self.reference_squares))
        median = float(np.median(np.concatenate(self.shares)))
        if not np.isfinite([error, median]).all():
            return LayerError(name, why="its output, or the reference's, is zero or not a number")
        return LayerError(name, error, median, float(np.median(np.concatenate(self.added))) if self.added else None)


def _norms(vectors: np.ndarray) -> np.ndarray:
    """Euclidean norms of vectors [N, D], in float64."""
    return np.sqrt(np.square(vectors, dtype=np.float64).sum(1))


def _why(count: int, own: np.ndarray, in_reference: bool) -> str:
    if not in_reference:
        return "the reference has no such layer"
    return f"the reference's layer has {count or 'no'} outputs of shape {list(own.shape)}, not one"


def _by_number(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key of a path that compares numbers as such: 9 comes before 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
