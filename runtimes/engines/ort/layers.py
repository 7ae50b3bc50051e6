"""An engine that also returns the outputs of the layers of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...artifact.manifest import Manifest
from ..batch import Batch
from ..runs import Run
from .device import Device
from .engine import OrtEngine
from .graph import GraphSession
from .section import GraphFile


@dataclass(frozen=True)
class GraphWithLayerOutputs:
    """A graph with the outputs of its layers as additional outputs.

    Attributes:
        model: the serialized graph, which refers to the weights of the artifact.
        values: the name of the graph output with a layer's output, by the layer's name.
        before: by a layer's name, the layer whose output it uses.
        unclear: by a layer's name, why it has no single output.
    """

    model: bytes
    values: Mapping[str, str]
    before: Mapping[str, str]
    unclear: Mapping[str, str]


class LayerOutputEngine(OrtEngine):
    """An artifact whose graphs also return the outputs of layers; see `LayerEngine`.

    Args:
        graphs_with_outputs: the graphs by file name.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        graphs_with_outputs: Mapping[str, GraphWithLayerOutputs],
        *,
        threads: int | None = None,
    ) -> None:
        self.graphs_with_outputs = graphs_with_outputs
        self._pieces: list[dict[str, np.ndarray]] = []
        self._wrong_shapes: dict[str, str] = {}
        super().__init__(folder, manifest, threads=threads)

    @property
    def unclear(self) -> dict[str, str]:
        """Why layers have no output value; reasons that only a run shows appear after the first call of `values`."""
        by_graph = {layer: why for graph in self.graphs_with_outputs.values() for layer, why in graph.unclear.items()}
        return by_graph | self._wrong_shapes

    @property
    def before(self) -> dict[str, str]:
        return {layer: other for graph in self.graphs_with_outputs.values() for layer, other in graph.before.items()}

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(name for graph in self.graphs_with_outputs.values() for name in graph.values))

    def values(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        self._pieces.clear()
        self.forward(Batch.one(tokens))
        common = [layer for layer in self._pieces[0] if all(layer in piece for piece in self._pieces)]
        return {layer: np.concatenate([piece[layer] for piece in self._pieces], 1) for layer in common}

    def _open(self, spec: GraphFile) -> GraphSession:
        graph = self.graphs_with_outputs[spec.file]
        return _SessionWithLayerOutputs(self.folder, spec, self.device, self.spec.vocab_size, graph, self._traces)

    def _run(self, batch: Batch, run: Run, name: str) -> np.ndarray:
        logits = super()._run(batch, run, name)
        graph = self._graph(name)
        assert isinstance(graph, _SessionWithLayerOutputs)
        by_token = {layer: value for layer, value in graph.seen.items() if value.shape[:2] == run.tokens.shape}
        for layer in graph.seen.keys() - by_token:
            shape = list(graph.seen[layer].shape)
            self._wrong_shapes[layer] = f"its output has the shape {shape}, not one vector per token"
        self._pieces.append(by_token)
        return logits


class _SessionWithLayerOutputs(GraphSession):
    """A session that keeps the layers' outputs of the last call, [B, S, ...], in `seen`."""

    def __init__(
        self,
        folder: Path,
        spec: GraphFile,
        device: Device,
        vocab_size: int,
        graph: GraphWithLayerOutputs,
        trace: Path | None = None,
    ) -> None:
        super().__init__(folder, spec, device, vocab_size, graph.model, trace)
        self.names = graph.values
        self.seen: dict[str, np.ndarray] = {}

    def run(self, binding: ort.IOBinding, *arguments: Any, **named: Any) -> np.ndarray:
        # Bound for each call: otherwise ONNX Runtime would reuse the buffer of the last call, which may have another
        # length. Bound before the logits, which are the last output.
        for name in self.names.values():
            binding.bind_output(name, "cpu")
        logits = super().run(binding, *arguments, **named)
        values = binding.get_outputs()[-1 - len(self.names) : -1]
        self.seen = {layer: np.array(v.numpy(), np.float32) for layer, v in zip(self.names, values, strict=True)}
        return logits
