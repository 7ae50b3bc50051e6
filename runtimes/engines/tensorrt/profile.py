"""Run one profile of a plan: its inputs and outputs are in the same memory in every call."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ....errors import LlmcError
from ...cuda.driver import Driver
from ...cuda.graphs import Graph, capture
from ...cuda.memory import DeviceArray, PinnedArray
from ..device_caches import DeviceCaches
from .bound_context import BoundContext, CallShape
from .open_plan import OpenPlan
from .section import ALIGNMENT

# Captured calls that are kept; the oldest is freed for a new one. Each has a context, which takes memory.
MOST_GRAPHS = 32
_WORD = np.dtype(np.int64).itemsize


@dataclass(frozen=True)
class CapturedCall:
    """A CUDA graph, and the context that it was captured from.

    A graph uses memory of its context. If the context were used for another call, the graph would be wrong.
    """

    graph: Graph
    context: BoundContext

    def free(self) -> None:
        self.graph.free()
        self.context.close()


class ProfileRunner:
    """Calls of one profile.

    When a call is made for the second time, with the same slots and sizes, it gets a context of its own and is captured
    as a CUDA graph after it ran. From the third time on, the graph is replayed.

    Args:
        index: the profile.
        batch: the most sequences of a call.
        tokens: the most new tokens of each.
        captures: capture calls.

    Attributes:
        graphs: captured calls.
    """

    def __init__(
        self,
        plan: OpenPlan,
        index: int,
        driver: Driver,
        stream: int,
        caches: DeviceCaches,
        *,
        batch: int,
        tokens: int,
        vocab_size: int,
        captures: bool,
    ) -> None:
        self._plan, self._index, self._driver, self._stream = plan, index, driver, stream
        self._caches, self._vocab_size, self._captures = caches, vocab_size, captures
        self._most = batch * tokens
        self._context = BoundContext(plan, index, caches)
        # Each input begins where TensorRT wants it to, at the same place for all shapes.
        sizes = {"input_ids": batch * tokens, "starts": batch, "rows": tokens}
        ends = np.cumsum([-(-size * _WORD // ALIGNMENT) * ALIGNMENT for size in sizes.values()]) // _WORD
        self._places = dict(zip(sizes, [0, *ends[:-1].tolist()], strict=True))
        self._staged = PinnedArray(driver, (int(ends[-1]),), np.int64)
        self._inputs = DeviceArray(driver, (int(ends[-1]),), _WORD)
        self._logits = DeviceArray(driver, (0, vocab_size), 4)
        self._copied = PinnedArray(driver, (0, vocab_size), np.float32)
        self._seen: set[CallShape] = set()
        self.graphs: dict[CallShape, CapturedCall] = {}

    def run(self, tokens: np.ndarray, starts: np.ndarray, rows: np.ndarray, slot: int) -> np.ndarray:
        """Run new tokens; return the logits of the wanted ones, [B * R, V], valid until the next run.

        Args:
            tokens: int64 [B, S].
            starts: int64 [B], the number of positions that each sequence holds.
            rows: int64 [R], indices from 0 to S-1, at least one.
            slot: the first of the adjacent slots.
        """
        shape = CallShape(slot, batch=tokens.shape[0], tokens=tokens.shape[1], rows=len(rows))
        self._reserve(shape.batch * shape.rows)
        self._stage(tokens, starts, rows)
        captured, own = self.graphs.get(shape), None
        try:
            if captured is not None:
                captured.graph.launch(self._stream)
            else:
                own = self._own_context(shape)
                self._enqueue(own or self._context, shape)
            self._driver.synchronize(self._stream)
        except BaseException:
            # The next call must not change inputs that work on the stream still reads.
            with suppress(LlmcError):
                self._driver.synchronize(self._stream)
            raise
        if own is not None:
            self._capture(own, shape)
        return self._copied.array[: shape.batch * shape.rows]

    def forget(self) -> None:
        """Forget what depends on the addresses of caches and logits."""
        self._context.forget()
        self._seen.clear()
        for captured in self.graphs.values():
            captured.free()
        self.graphs.clear()

    def free(self) -> None:
        """Free contexts, graphs and memory. A second call does nothing."""
        self.forget()
        self._context.close()
        for memory in (self._staged, self._inputs, self._logits, self._copied):
            memory.free()

    def _reserve(self, count: int) -> None:
        """Make room for the logits of `count` tokens."""
        has = self._logits.shape[0]
        if count <= has:
            return
        self.forget()
        size = min(max(count, 2 * has), self._most)
        logits = DeviceArray(self._driver, (size, self._vocab_size), 4)
        try:
            copied = PinnedArray(self._driver, (size, self._vocab_size), np.float32)
        except BaseException:
            logits.free()
            raise
        old, self._logits, self._copied = self._logits, logits, copied
        old.free()

    def _stage(self, *inputs: np.ndarray) -> None:
        """Write the inputs where the next call copies them from."""
        for place, values in zip(self._places.values(), inputs, strict=True):
            self._staged.array[place : place + values.size] = values.reshape(-1)

    def _enqueue(self, context: BoundContext, shape: CallShape) -> None:
        """Put a call on the stream: inputs to the device, the plan, logits to the host."""
        inputs = {name: self._inputs.address + place * _WORD for name, place in self._places.items()}
        context.bind(shape, inputs | {"logits": self._logits.address})
        self._driver.copy_to_device(self._inputs.address, self._staged.address, self._inputs.nbytes, self._stream)
        context.enqueue(self._stream)
        nbytes = shape.batch * shape.rows * self._vocab_size * 4
        self._driver.copy_to_host(self._copied.address, self._logits.address, nbytes, self._stream)

    def _own_context(self, shape: CallShape) -> BoundContext | None:
        """Return a context of its own for a call that will be captured; None for others."""
        if not self._captures:
            return None
        if shape not in self._seen:
            self._seen.add(shape)
            return None
        try:
            return BoundContext(self._plan, self._index, self._caches)
        except LlmcError:
            self._captures = False  # too little memory, for example
            return None

    def _capture(self, context: BoundContext, shape: CallShape) -> None:
        """Capture a call that its context has just run, as TensorRT requires."""
        try:
            graph = capture(self._driver, self._stream, lambda: self._enqueue(context, shape))
        except LlmcError:
            self._captures = False  # some kernel can't be captured; calls without graphs compute the same
            return
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.pop(next(iter(self.graphs))).free()
        self.graphs[shape] = CapturedCall(graph, context)
