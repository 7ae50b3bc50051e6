"""The engine of target "ort": caches are bound once and written in place; a step runs the whole batch in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ....errors import LlmcError, UsageError
from ...artifact.manifest import CacheSpec, Manifest
from ..base import KernelTime, check_fits
from ..cores import physical_cores
from ..onnx_names import past_name, present_name
from .profile import kernel_times
from .section import GraphFile, read_section
from .session import open_session

# The most tokens of a sequence in one call. Attention computes the scores of all pairs of a call, also of masked ones,
# so several shorter calls need less work. Longer calls would not make matmuls more efficient.
PIECE = 256
# The dtype of a cache in the manifest -> the dtype of the graph's inputs and outputs.
_DTYPES = {"fp32": np.float32, "int8": np.int8, "fp8": np.uint8}


class OrtEngine:
    """An artifact of target "ort"; see `Engine`.

    The step graph runs few tokens per sequence, the prefill graph many. Each graph is opened when it is first needed.
    Sequences with more than one new token run one at a time, since the fused attention does not support a batch of
    them. This costs nothing: one such sequence already uses all cores.

    Args:
        threads: threads of the matmuls; by default one per physical core.

    Attributes:
        caches: for each KV cache its spec and the arrays of its parts, which the graphs update in place.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None, slots: int = 1) -> None:
        self.folder = folder
        self.manifest = manifest
        self.vocab_size = manifest.model.vocab_size
        self.max_seq_len = manifest.max_seq_len
        self.threads = threads or physical_cores()
        self._files = read_section(manifest).graphs
        self._graphs: dict[str, GraphSession] = {}
        self._traces: Path | None = None
        self._ones = np.ones((1, self.max_seq_len), np.int64)
        self._graph(1)
        self.open_slots(slots)

    def open_slots(self, count: int) -> None:
        self.slots = count
        # Unwritten positions must be finite, since they are multiplied by an attention weight of zero.
        self.caches = [(spec, _zeros(spec, count)) for spec in self.manifest.caches]
        self._ring = min((spec.length for spec in self.manifest.caches if spec.kind == "ring"), default=None)
        self._ends = [0] * count
        for graph in self._graphs.values():
            graph.forget()

    def forward(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
    ) -> np.ndarray:
        tokens = np.ascontiguousarray(tokens, np.int64)
        batch, length = tokens.shape
        used = range(batch) if slots is None else [int(slot) for slot in slots]
        self._check(tokens, starts, used)
        if length > PIECE:
            pieces = self._in_pieces(tokens, starts, np.asarray(used), last_only)
            return pieces[-1] if last_only else np.concatenate(pieces, 1)
        if self._ring is not None:
            self._check_rollback(starts, used, length, self._ring)
        graph = self._graph(length)
        runs = list(_adjacent(used, 1 if length > 1 else batch))
        if len(runs) == 1:
            return self._run(graph, tokens, starts, used[0], last_only)
        logits = np.empty((batch, 1 if last_only else length, self.vocab_size), np.float32)
        for first, last in runs:
            part = slice(first, last)
            logits[part] = self._run(graph, tokens[part], starts[part], used[first], last_only)
        return logits

    def profile(self, work: Callable[[], object], warm_up: Callable[[], object]) -> list[KernelTime]:
        """See `Profiles`. A session is profiled from its creation on, so graphs are opened again before and after."""
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
        pieces = range(0, tokens.shape[1], PIECE)
        return [self.forward(tokens[:, i : i + PIECE], starts + i, slots, last_only) for i in pieces]

    def _run(
        self, graph: GraphSession, tokens: np.ndarray, starts: np.ndarray, slot: int, last_only: bool
    ) -> np.ndarray:
        """Run sequences in adjacent slots, the first of which is `slot`, in one call."""
        batch, length = tokens.shape
        ends = np.asarray(starts) + length
        total = int(ends.max())
        mask = self._ones[:, :total] if batch == 1 else (np.arange(total) < ends[:, None]).astype(np.int64)
        binding = graph.binding(slot, batch, self.caches)
        return graph.run(binding, tokens, mask, last_only)

    def _graph(self, length: int) -> GraphSession:
        """Return the graph for this many tokens per sequence."""
        fitting = {name: phase for name, phase in self.manifest.phases.items() if phase.serves(length)}
        name = max(fitting, key=lambda n: fitting[n].min_tokens)
        if name not in self._graphs:
            self._graphs[name] = self._open(self._files[name])
        return self._graphs[name]

    def _open(self, spec: GraphFile) -> GraphSession:
        return GraphSession(self.folder, spec, self.threads, self.vocab_size, trace=self._traces)

    def _check(self, tokens: np.ndarray, starts: np.ndarray, slots: Sequence[int]) -> None:
        check_fits(starts, tokens.shape[1], self.max_seq_len)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise UsageError(
                "TOKEN_UNKNOWN",
                f"A token id is outside 0..{self.vocab_size - 1}.",
                "Use the tokenizer in the artifact.",
            )
        if closed := [slot for slot in slots if not 0 <= slot < self.slots]:
            raise UsageError(
                "SLOT_CLOSED", f"Slot {closed[0]} is not open: there are {self.slots}.", "Call open_slots first."
            )

    def _check_rollback(self, starts: np.ndarray, slots: Sequence[int], length: int, ring: int) -> None:
        """Refuse starts whose window is partly overwritten, and record the new ends.

        A slot with more positions than a ring can go back by one position, or to 0.
        """
        for start, slot in zip(starts, slots, strict=True):
            if 0 < start < self._ends[slot] - 1 and self._ends[slot] > ring:
                raise UsageError(
                    "ROLLBACK_TOO_FAR",
                    f"Slot {slot} holds {self._ends[slot]} positions and can't go back to {start}: a layer keeps only "
                    "its sliding window.",
                    "Start again from 0, or compile with --kv-cache static.",
                )
            self._ends[slot] = int(start) + length


def _zeros(spec: CacheSpec, slots: int) -> list[np.ndarray]:
    """Return zeros for all tensors of a cache."""
    return [np.zeros((slots, spec.heads, spec.length, part.width), _DTYPES[part.dtype]) for part in spec.parts]


def _adjacent(slots: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of batch entries whose slots are adjacent, so that their caches are contiguous in memory."""
    first = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[i - 1] + 1 or i - first == longest:
            yield first, i
            first = i


class GraphSession:
    """An ONNX Runtime session of one graph, and its bindings to cache slots.

    Args:
        model: a graph to open instead of the artifact's own.
        trace: the path of a trace file; profiles the session.

    Attributes:
        runs: the number of runs so far.
        selects_logits: True if the graph has an input with the indices of the tokens whose logits it returns.
    """

    def __init__(
        self,
        folder: Path,
        spec: GraphFile,
        threads: int,
        vocab_size: int,
        model: bytes | None = None,
        trace: Path | None = None,
    ) -> None:
        self.session, self._held = open_session(folder, spec, threads, model, trace)
        self.runs = 0
        self.selects_logits = any(i.name == "rows" for i in self.session.get_overridable_initializers())
        self.file = spec.file
        self.vocab_size = vocab_size
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._last = np.array([-1])
        # The outputs of a binding are in the order in which they were first bound: caches, then logits.
        self._logits = len(self.session.get_outputs()) - 1

    def forget(self) -> None:
        self._bindings.clear()

    def end_profile(self) -> Path:
        """Stop profiling; return the trace file."""
        return Path(self.session.end_profiling())

    def binding(self, slot: int, batch: int, caches: list[tuple[CacheSpec, list[np.ndarray]]]) -> ort.IOBinding:
        """Return a binding of past and present of adjacent slots to the same memory.

        Args:
            slot: the first slot.
            batch: the number of slots.
        """
        key = (slot, batch)
        if key not in self._bindings:
            binding = self._bindings[key] = self.session.io_binding()
            for i, (spec, arrays) in enumerate(caches):
                for array, part in zip(arrays, spec.parts, strict=True):
                    memory = array[slot : slot + batch]
                    at = ("cpu", 0, array.dtype, memory.shape, memory.ctypes.data)
                    binding.bind_input(past_name(i, part.role), *at)
                    binding.bind_output(present_name(i, part.role), *at)
        return self._bindings[key]

    def run(self, binding: ort.IOBinding, tokens: np.ndarray, mask: np.ndarray, last_only: bool) -> np.ndarray:
        batch, length = tokens.shape
        inputs = {"input_ids": tokens, "attention_mask": mask}
        count = length
        if self.selects_logits:
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
        # The graph declares logits of one token. It checks the shape of a caller's buffer, but not of its own.
        binding.bind_output("logits", "cpu")
        self._run(binding)
        logits = binding.get_outputs()[self._logits].numpy()
        return logits[:, -1:] if last_only else logits

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


ENGINE = OrtEngine
