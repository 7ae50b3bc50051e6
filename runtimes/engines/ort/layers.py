"""An engine that also tells what leaves each layer of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ...artifact.manifest import GraphSpec, Manifest
from ...measure.windows import Window
from .engine import GraphSession, OrtEngine


@dataclass(frozen=True)
class WatchedGraph:
    """A graph with more outputs than the artifact's own.

    Attributes:
        model: as ONNX Runtime reads it, over the weights of the artifact.
        values: the output that leaves a layer, by the layer's name.
        before: the layer that another one reads it from.
        unclear: why other layers have none.
    """

    model: bytes
    values: Mapping[str, str]
    before: Mapping[str, str]
    unclear: Mapping[str, str]


class WatchedEngine(OrtEngine):
    """An artifact at work, by graphs that give the values between layers, too; see `Watched`.

    Args:
        watched: its graphs by their files.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, watched: Mapping[str, WatchedGraph], *, threads: int | None = None
    ) -> None:
        self.watched = watched
        self._pieces: list[dict[str, np.ndarray]] = []
        self._odd: dict[str, str] = {}
        super().__init__(folder, manifest, threads=threads)

    @property
    def unclear(self) -> dict[str, str]:
        """Why layers have no value; what only a run shows is known behind the first call of `values`."""
        known = {layer: why for graph in self.watched.values() for layer, why in graph.unclear.items()}
        return known | self._odd

    @property
    def before(self) -> dict[str, str]:
        return {layer: other for graph in self.watched.values() for layer, other in graph.before.items()}

    def values(self, window: Window) -> dict[str, np.ndarray]:
        self._pieces.clear()
        self.forward(window.tokens[None, :-1], np.zeros(1, np.int64), np.zeros(1, np.int64))
        common = [layer for layer in self._pieces[0] if all(layer in piece for piece in self._pieces)]
        return {layer: np.concatenate([piece[layer] for piece in self._pieces], 1) for layer in common}

    def _open(self, spec: GraphSpec) -> GraphSession:
        return _Watched(self.folder, spec, self.threads, self.vocab_size, self.watched[spec.file], self._traces)

    def _run(
        self, graph: GraphSession, tokens: np.ndarray, starts: np.ndarray, slot: int, last_only: bool
    ) -> np.ndarray:
        logits = super()._run(graph, tokens, starts, slot, last_only)
        assert isinstance(graph, _Watched)
        rows = {layer: value for layer, value in graph.seen.items() if value.shape[:2] == tokens.shape}
        for layer in graph.seen.keys() - rows:
            self._odd[layer] = f"what leaves it has the shape {list(graph.seen[layer].shape)}, no row for each token"
        self._pieces.append(rows)
        return logits


class _Watched(GraphSession):
    """Keeps what left each layer in the last call, [B, S, ...], under `seen`."""

    def __init__(
        self,
        folder: Path,
        spec: GraphSpec,
        threads: int,
        vocab_size: int,
        watched: WatchedGraph,
        trace: Path | None = None,
    ) -> None:
        super().__init__(folder, spec, threads, vocab_size, watched.model, trace)
        self.names = watched.values
        self.seen: dict[str, np.ndarray] = {}

    def run(self, binding: ort.IOBinding, tokens: np.ndarray, mask: np.ndarray, last_only: bool) -> np.ndarray:
        # Each time: without a buffer of the caller's the last call's would be taken, which has its length. Before the
        # logits, which are the last to be bound.
        for name in self.names.values():
            binding.bind_output(name, "cpu")
        logits = super().run(binding, tokens, mask, last_only)
        values = binding.get_outputs()[-1 - len(self.names) : -1]
        self.seen = {layer: np.array(v.numpy(), np.float32) for layer, v in zip(self.names, values, strict=True)}
        return logits
