"""ONNX Runtime as an engine: caches bound once and written in place, one run call for all rows of a step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ....errors import LlmcError, UsageError
from ...artifact.manifest import CacheSpec, GraphSpec, Manifest
from ..base import KernelTime, check_fits
from ..cores import physical_cores
from .profile import kernel_times
from .session import open_session

# Tokens of a row that go through in one call. Attention computes the scores of all pairs of a call, also of those that
# the mask takes away, so half as many tokens twice are less work; matmuls are at their best from here on.
_PIECE = 256
# What a graph takes the numbers of a cache as.
_NUMBERS = {"fp32": np.float32, "int8": np.int8, "fp8": np.uint8}


class OrtEngine:
    """An artifact of target "ort" at work; see `Engine`.

    A graph may serve some numbers of tokens better than others: "step" is for few, "prefill" for many. Each is
    opened when it is first needed. Rows with more than one token each run one by one, for the fused attention takes
    no batch of them; that costs nothing, since one such row already keeps all cores busy.

    Args:
        threads: for the matmuls; one for each physical core where none is given.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None, slots: int = 1) -> None:
        self.folder = folder
        self.manifest = manifest
        self.vocab_size = int(manifest.model["vocab_size"])
        self.max_seq_len = manifest.max_seq_len
        self.threads = threads or physical_cores()
        self._graphs: dict[str, GraphSession] = {}
        self._traces: Path | None = None
        self._ones = np.ones((1, self.max_seq_len), np.int64)
        self._graph(1)
        self.open_slots(slots)

    def open_slots(self, count: int) -> None:
        self.slots = count
        # Zeros: what was never written must be finite, for it is multiplied by a weight of zero.
        self._caches = [(spec, _room(spec, count)) for spec in self.manifest.caches]
        self._ring = min((spec.length for spec in self.manifest.caches if spec.kind == "ring"), default=None)
        self._ends = [0] * count
        for graph in self._graphs.values():
            graph.forget()

    def forward(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
    ) -> np.ndarray:
        tokens = np.ascontiguousarray(tokens, np.int64)
        batch, length = tokens.shape
        rows = range(batch) if slots is None else [int(slot) for slot in slots]
        self._check(tokens, starts, rows)
        if length > _PIECE:
            pieces = self._in_pieces(tokens, starts, np.asarray(rows), last_only)
            return pieces[-1] if last_only else np.concatenate(pieces, 1)
        if self._ring is not None:
            self._check_going_back(starts, rows, length, self._ring)
        graph = self._graph(length)
        together = list(_runs(rows, 1 if length > 1 else batch))
        if len(together) == 1:
            return self._run(graph, tokens, starts, rows[0], last_only)
        parts = np.empty((batch, 1 if last_only else length, self.vocab_size), np.float32)
        for first, last in together:
            part = slice(first, last)
            parts[part] = self._run(graph, tokens[part], starts[part], rows[first], last_only)
        return parts

    def profile(self, work: Callable[[], object], warm_up: Callable[[], object]) -> list[KernelTime]:
        """See `Profiles`. A session is profiled from its creation, so the graphs are opened anew, before and after."""
        with tempfile.TemporaryDirectory(prefix="llmc-profile-") as folder:
            self._traces = Path(folder, "trace")
            self._graphs.clear()
            try:
                warm_up()
                warm = {name: graph.runs for name, graph in self._graphs.items()}
                work()
                return kernel_times((graph.end_profile(), warm.get(name, 0)) for name, graph in self._graphs.items())
            finally:
                self._traces = None
                self._graphs.clear()

    def _in_pieces(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray, last_only: bool
    ) -> list[np.ndarray]:
        pieces = range(0, tokens.shape[1], _PIECE)
        return [self.forward(tokens[:, i : i + _PIECE], starts + i, slots, last_only) for i in pieces]

    def _run(
        self, graph: GraphSession, tokens: np.ndarray, starts: np.ndarray, slot: int, last_only: bool
    ) -> np.ndarray:
        """Rows in adjacent slots, in one call."""
        batch, length = tokens.shape
        ends = np.asarray(starts) + length
        total = int(ends.max())
        mask = self._ones[:, :total] if batch == 1 else (np.arange(total) < ends[:, None]).astype(np.int64)
        binding = graph.binding(slot, batch, self._caches)
        return graph.run(binding, tokens, mask, last_only)

    def _graph(self, length: int) -> GraphSession:
        """The graph for this many tokens a row."""
        fit = {n: g for n, g in self.manifest.graphs.items() if g.min_rows <= length <= (g.max_rows or length)}
        name = max(fit, key=lambda n: fit[n].min_rows)
        if name not in self._graphs:
            self._graphs[name] = self._open(fit[name])
        return self._graphs[name]

    def _open(self, spec: GraphSpec) -> GraphSession:
        return GraphSession(self.folder, spec, self.threads, self.vocab_size, trace=self._traces)

    def _check(self, tokens: np.ndarray, starts: np.ndarray, rows: Sequence[int]) -> None:
        check_fits(starts, tokens.shape[1], self.max_seq_len)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise UsageError(
                "TOKEN_UNKNOWN",
                f"A token is outside 0..{self.vocab_size - 1}.",
                "Use the tokenizer of the artifact.",
            )
        if closed := [row for row in rows if not 0 <= row < self.slots]:
            raise UsageError(
                "SLOT_CLOSED", f"Slot {closed[0]} is not open, only {self.slots} are.", "Call open_slots first."
            )

    def _check_going_back(self, starts: np.ndarray, rows: Sequence[int], length: int, ring: int) -> None:
        """Once a ring is full, its last token can be taken back, or all; others have overwritten what they saw."""
        for start, row in zip(starts, rows, strict=True):
            if 0 < start < self._ends[row] - 1 and self._ends[row] > ring:
                raise UsageError(
                    "ROLLBACK_TOO_FAR",
                    f"Slot {row} holds {self._ends[row]} positions and can't go back to {start}: a layer keeps its "
                    "sliding window only.",
                    "Start again from 0, or compile with --kv-cache static.",
                )
            self._ends[row] = int(start) + length


def _room(spec: CacheSpec, slots: int) -> list[np.ndarray]:
    """Zeros for what a cache keeps of so many sequences."""
    return [np.zeros((slots, spec.heads, spec.length, part.width), _NUMBERS[part.dtype]) for part in spec.tensors]


def _runs(slots: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose slots follow one another, so that their caches are one piece of memory."""
    first = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[i - 1] + 1 or i - first == longest:
            yield first, i
            first = i


class GraphSession:
    """A session, and its bindings by the slots that they reach.

    Attributes:
        runs: the number of runs so far.
    """

    def __init__(
        self,
        folder: Path,
        spec: GraphSpec,
        threads: int,
        vocab_size: int,
        model: bytes | None = None,
        trace: Path | None = None,
    ) -> None:
        self.session, self._held = open_session(folder, spec, threads, model, trace)
        self.runs = 0
        self.chooses_rows = any(i.name == "rows" for i in self.session.get_overridable_initializers())
        self.file = spec.file
        self.vocab_size = vocab_size
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._last = np.array([-1])
        # Outputs stand in a binding in the order in which they were first bound: the caches, then the logits.
        self._logits = len(self.session.get_outputs()) - 1

    def forget(self) -> None:
        self._bindings.clear()

    def end_profile(self) -> Path:
        """Stop profiling; return the trace file."""
        return Path(self.session.end_profiling())

    def binding(self, slot: int, batch: int, caches: list[tuple[CacheSpec, list[np.ndarray]]]) -> ort.IOBinding:
        """Past and present of the slots from this one on, bound to the same memory."""
        key = (slot, batch)
        if key not in self._bindings:
            made = self._bindings[key] = self.session.io_binding()
            for spec, arrays in caches:
                for array, part in zip(arrays, spec.tensors, strict=True):
                    rows = array[slot : slot + batch]
                    made.bind_input(part.past, "cpu", 0, array.dtype, rows.shape, rows.ctypes.data)
                    made.bind_output(part.present, "cpu", 0, array.dtype, rows.shape, rows.ctypes.data)
        return self._bindings[key]

    def run(self, binding: ort.IOBinding, tokens: np.ndarray, mask: np.ndarray, last_only: bool) -> np.ndarray:
        batch, length = tokens.shape
        inputs = {"input_ids": tokens, "attention_mask": mask}
        count = length
        if self.chooses_rows:
            inputs["rows"] = self._last if last_only else np.arange(length)
            count = len(inputs["rows"])
        self.runs += 1
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        if count == 1:
            logits = np.empty((batch, 1, self.vocab_size), np.float32)
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self._run(binding)
            return logits
        # The graph says that it gives one row, and holds buffers of others to that, but not what it allocates itself.
        binding.bind_output("logits", "cpu")
        self._run(binding)
        logits = binding.get_outputs()[self._logits].numpy()
        return logits[:, -1:] if last_only else logits

    def _run(self, binding: ort.IOBinding) -> None:
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # the binding's exception classes are private
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
            raise LlmcError(
                "GRAPH_FAILED",
                f"ONNX Runtime {ort.__version__} failed while it ran {self.file}: {reason}.",
                "Check the artifact on this machine: llmc verify DIR",
            ) from error
