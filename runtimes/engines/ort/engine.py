"""The engine of target "ort": caches are bound once and written in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import numpy as np

from ....errors import UsageError
from ...artifact.manifest import Manifest
from ..base import KernelTime
from ..batch import Batch, check_slots
from ..logits import HostLogits
from ..runs import Run, plan_runs
from .device import Device, open_device
from .graph import GraphSession
from .profile import kernel_times
from .section import GraphFile, read_section


class OrtEngine:
    """An artifact of target "ort"; see `Engine`.

    The step graph runs few tokens per sequence, the prefill graph many. Each graph is opened when it is first needed.

    Args:
        threads: threads of the matmuls on a CPU; by default one per physical core.
        device: where it computes; by default what the artifact names.

    Attributes:
        device: where it computes.
        caches: the KV caches, which the graphs update in place.
        around_run: see `ReportsRuns`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        slots: int = 1,
        device: Device | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        section = read_section(manifest)
        self.device = open_device(section.device, threads) if device is None else device
        self.spec = self.device.spec(manifest)
        self._ring = min((spec.length for spec in manifest.caches if spec.kind == "ring"), default=None)
        self.around_run: Callable[[Sequence[int]], AbstractContextManager[object]] = nullcontext
        self.slots = 0
        self._files = section.graphs
        self._graphs: dict[str, GraphSession] = {}
        self._closed_runs = 0  # runs of graphs that were closed
        self._traces: Path | None = None
        self.caches = self.device.make_caches(manifest.caches)
        self._reached = np.zeros(0, np.int64)  # the most positions that each slot has held since it began at 0
        self._ones = np.ones((1, manifest.max_seq_len), np.int64)
        self._logits = np.empty((0, manifest.model.vocab_size), np.float32)
        self._is_open = True
        try:
            self._graph(self._graph_for_length(1))
            self.open_slots(slots)
        except BaseException:
            self.close()
            raise

    @property
    def runs(self) -> int:
        return self._closed_runs + sum(graph.runs for graph in self._graphs.values())

    def open_slots(self, count: int) -> None:
        self._check_open()
        reached = np.zeros(count, np.int64)
        reached[: self.slots] = self._reached[:count]
        for graph in self._graphs.values():
            graph.forget()
        self.caches.open(reached)
        self.slots, self._reached = count, reached

    def forward(self, batch: Batch) -> HostLogits:
        self._check_open()
        batch.check(self.spec, self.slots)
        self._check_rollback(batch.slots, batch.starts)
        ends = batch.starts + batch.lengths
        self._reached[batch.slots] = np.where(batch.starts > 0, np.maximum(self._reached[batch.slots], ends), ends)
        common = self._graph_for_batch(batch)
        runs = plan_runs(batch, self.device.longest_run, mixes=common is not None and self._graph(common).mixes)
        graphs = [common or self._graph_for_length(run.tokens.shape[1]) for run in runs]
        if len(runs) == 1 and np.array_equal(runs[0].target, np.arange(len(batch.wanted))):
            return HostLogits(self._run(batch, runs[0], graphs[0]))
        logits = self._buffer(len(batch.wanted))
        for run, graph in zip(runs, graphs, strict=True):
            values = self._run(batch, run, graph)
            logits[run.target[run.target >= 0]] = values[run.target >= 0]
        return HostLogits(logits)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self._check_open()
        check_slots(np.array([source, target]), self.slots)
        if source == target:
            return
        self.caches.copy_slot(source, target, length)
        self._reached[target] = length if self._ring is None else self._reached[source]

    def close(self) -> None:
        if not self._is_open:
            return
        self._close_graphs()
        self.slots, self._is_open = 0, False
        with ExitStack() as last_first:
            last_first.callback(self.device.close)
            last_first.callback(self.caches.free)

    def profile(self, work: Callable[[], object], warm_up: Callable[[], object]) -> list[KernelTime]:
        """See `Profiles`. A session is profiled from its creation on, so graphs are opened again before and after.

        Raises:
            UsageError: PROFILE_UNSUPPORTED on a GPU.
        """
        if self.device.name != "cpu":
            raise UsageError(
                "PROFILE_UNSUPPORTED",
                "ONNX Runtime records when kernels of a GPU are started, not how long they take.",
                "Leave out --profile, and use NVIDIA's Nsight Systems.",
            )
        with tempfile.TemporaryDirectory(prefix="llmc-profile-") as folder:
            self._traces = Path(folder, "trace")
            self._close_graphs()
            try:
                warm_up()
                warm = {name: graph.runs for name, graph in self._graphs.items()}
                work()
                return kernel_times((graph.end_profile(), warm.get(name, 0)) for name, graph in self._graphs.items())
            finally:
                self._traces = None
                self._close_graphs()

    def _close_graphs(self) -> None:
        self._closed_runs = self.runs
        self._graphs.clear()

    def _run(self, batch: Batch, run: Run, name: str) -> np.ndarray:
        """Run tokens on a graph; return the logits of the wanted ones, [B * W, V]."""
        total = int(run.ends.max())
        is_one = len(run.ends) == 1
        mask = self._ones[:, :total] if is_one else (np.arange(total) < run.ends[:, None]).astype(np.int64)
        graph = self._graph(name)
        slot, end = (None, None) if run.piece is None else (run.piece.slot, run.piece.end)
        binding = graph.binding(run.slot, len(run.ends), self.caches, slot)
        with self.around_run(run.tokens_per_sequence):
            logits = graph.run(binding, batch.tokens[run.tokens], mask, run.wanted, end)
        return logits.reshape(-1, self.spec.vocab_size)

    def _graph_for_batch(self, batch: Batch) -> str | None:
        """Return the name of the graph that serves all tokens of a batch of several sequences, if there is one."""
        if len(batch.lengths) > 1:
            for name, file in self._files.items():
                if file.batch_tokens is not None and len(batch.tokens) >= file.batch_tokens:
                    return name
        return None

    def _graph_for_length(self, length: int) -> str:
        """Return the name of the graph for this many tokens per sequence."""
        fitting = {name: phase for name, phase in self.manifest.phases.items() if phase.serves(length)}
        return max(fitting, key=lambda name: fitting[name].min_tokens)

    def _graph(self, name: str) -> GraphSession:
        if name not in self._graphs:
            self._graphs[name] = self._open(self._files[name])
        return self._graphs[name]

    def _open(self, spec: GraphFile) -> GraphSession:
        return GraphSession(self.folder, spec, self.device, self.spec.vocab_size, trace=self._traces)

    def _buffer(self, count: int) -> np.ndarray:
        """Return an array [count, V] that is reused: new pages for each call would cost more than writing them."""
        if len(self._logits) < count:
            self._logits = np.empty((count, self.spec.vocab_size), np.float32)
        return self._logits[:count]

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError("ENGINE_CLOSED", "The engine has been closed.", "Load the artifact again.")

    def _check_rollback(self, slots: np.ndarray, starts: np.ndarray) -> None:
        """Refuse starts whose window is partly overwritten.

        A slot that has held more positions than a ring can go back by `spec.rollback` positions, or to 0. This counts
        from the furthest position that it has held: going back brings no overwritten position back.
        """
        if self._ring is None:
            return
        reached = self._reached[slots]
        earliest = np.where(reached > self._ring, reached - self.spec.rollback, 0)
        far = (starts > 0) & (starts < earliest)
        if far.any():
            entry = int(far.argmax())
            raise UsageError(
                "ROLLBACK_TOO_FAR",
                f"Slot {slots[entry]} has held {reached[entry]} positions and can't go back to {starts[entry]}, only "
                f"to {earliest[entry]} or later: a layer with a sliding window has overwritten older ones.",
                "Start again from 0, or compile with a larger --spec-tokens or with --kv-cache static.",
            )


ENGINE = OrtEngine
