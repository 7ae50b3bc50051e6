"""One graph as a session of ONNX Runtime, bound to caches that it writes in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ....errors import LlmcError
from ..onnx_names import PIECE, piece_name
from .caches import BoundTensor
from .device import Caches, Device
from .section import GraphFile
from .session import open_session


class GraphSession:
    """An ONNX Runtime session of one graph, and its bindings to cache slots.

    Args:
        model: a graph to open instead of the artifact's own.
        trace: the path of a trace file; profiles the session.

    Attributes:
        runs: the number of runs so far.
        selects_logits: True if the graph has an input with the indices of the tokens whose logits it returns.
        mixes: True if the graph takes a piece of one more sequence.
    """

    def __init__(
        self,
        folder: Path,
        spec: GraphFile,
        device: Device,
        vocab_size: int,
        model: bytes | None = None,
        trace: Path | None = None,
    ) -> None:
        self.session, self._held = open_session(folder, spec, device, model, trace)
        self._device = device
        self.runs = 0
        self.selects_logits = any(i.name == "rows" for i in self.session.get_overridable_initializers())
        self.mixes = any(i.name == PIECE for i in self.session.get_inputs())
        self.file = spec.file
        self.vocab_size = vocab_size
        self._bindings: dict[tuple[int, int, int], ort.IOBinding] = {}
        self._logits = np.empty((0, 1, vocab_size), np.float32)
        # The outputs of a binding are in the order in which they were first bound: caches, then logits.
        self._logits_output = len(self.session.get_outputs()) - 1

    def forget(self) -> None:
        self._bindings.clear()

    def end_profile(self) -> Path:
        """Stop profiling; return the trace file."""
        return Path(self.session.end_profiling())

    def binding(self, slot: int, batch: int, caches: Caches, piece: int | None = None) -> ort.IOBinding:
        """Return a binding of past and present of adjacent slots to the same memory.

        Args:
            slot: the first slot.
            batch: the number of slots.
            piece: the slot of a piece.
        """
        # Without a piece, the graph copies the piece's caches onto themselves, which does nothing.
        key = (slot, batch, slot if piece is None else piece)
        if key not in self._bindings:
            binding = self._bindings[key] = self.session.io_binding()
            self._bind(binding, caches.bound(slot, batch), lambda name: name)
            if self.mixes:
                self._bind(binding, caches.bound(key[2], 1), piece_name)
        return self._bindings[key]

    def run(
        self,
        binding: ort.IOBinding,
        tokens: np.ndarray,
        mask: np.ndarray,
        wanted: np.ndarray,
        piece_end: int | None = None,
    ) -> np.ndarray:
        """Run new tokens; return the logits of the wanted ones, [B, W, V], valid until the next run.

        Args:
            tokens: int64 [B, S].
            mask: int64 [B, T], 1 at the positions that each sequence holds after the run.
            wanted: int64 [W], indices from 0 to S-1.
            piece_end: the number of positions that a piece's sequence holds after the run. `tokens` is then [1, N]:
                one token for each row of the mask, then the piece.
        """
        batch, length = tokens.shape
        inputs = {"input_ids": np.ascontiguousarray(tokens), "attention_mask": mask}
        # A graph returns the logits of one token at least.
        returned = (wanted if len(wanted) else np.array([length - 1])) if self.selects_logits else np.arange(length)
        if self.selects_logits:
            inputs["rows"] = returned
        if self.mixes:
            inputs[PIECE] = np.array([] if piece_end is None else [piece_end], np.int64)
        self.runs += 1
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        if len(returned) == 1:
            logits = self._buffer(batch)
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self._run(binding)
            return logits if len(wanted) else logits[:, :0]
        # The graph declares logits of one token. It checks the shape of a caller's buffer, but not of its own.
        binding.bind_output("logits", "cpu")
        self._run(binding)
        logits = binding.get_outputs()[self._logits_output].numpy()
        return logits if self.selects_logits else logits[:, wanted]

    def _buffer(self, count: int) -> np.ndarray:
        """Return an array [count, 1, V] that is reused: new pages for each run would cost more than writing them."""
        if len(self._logits) < count:
            self._logits = np.empty((count, 1, self.vocab_size), np.float32)
        return self._logits[:count]

    def _bind(self, binding: ort.IOBinding, tensors: Iterable[BoundTensor], name: Callable[[str], str]) -> None:
        for tensor in tensors:
            at = (self._device.name, 0, tensor.element_type, tensor.shape, tensor.address)
            binding.bind_input(name(tensor.past), *at)
            binding.bind_output(name(tensor.present), *at)

    def _run(self, binding: ort.IOBinding) -> None:
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # the exception classes of ONNX Runtime are private
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
            raise LlmcError(
                "GRAPH_FAILED",
                f"ONNX Runtime {ort.__version__} failed while it ran {self.file}: {reason}.",
                "Check the artifact on this machine: llmc verify DIR",
            ) from error
