"""Run one profile of a plan: its inputs and outputs are in the same memory in every call."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import LlmcError
from ...cuda.driver import Driver
from ...cuda.graphs import Graph, capture
from ...cuda.memory import DeviceArray, PinnedArray
from ..device_caches import DeviceCaches
from .open_plan import OpenPlan
from .section import ALIGNMENT

# Graphs that are kept; the oldest is freed for a new one.
MOST_GRAPHS = 64
_WORD = np.dtype(np.int64).itemsize


@dataclass(frozen=True)
class CallShape:
    """What must be the same for a call to be repeated as a CUDA graph.

    Attributes:
        slot: the first slot.
        batch: the number of sequences, in adjacent slots.
        tokens: new tokens of each.
        rows: returned logits of each.
    """

    slot: int
    batch: int
    tokens: int
    rows: int


class ProfileRunner:
    """Calls of one execution context.

    A call that has the shape of an earlier one is captured as a CUDA graph after it ran; the third is a replay.

    Args:
        batch: the most sequences of a call.
        tokens: the most new tokens of each.
        captures: capture calls.

    Attributes:
        graphs: captured calls.
    """

    def __init__(
        self,
        plan: OpenPlan,
        context: Any,
        driver: Driver,
        stream: int,
        caches: DeviceCaches,
        *,
        batch: int,
        tokens: int,
        vocab_size: int,
        captures: bool,
    ) -> None:
        self._plan, self._context, self._driver, self._stream = plan, context, driver, stream
        self._caches, self._vocab_size, self._captures = caches, vocab_size, captures
        self._most = batch * tokens
        # Each input begins where TensorRT wants it to, at the same place for all shapes.
        sizes = {"input_ids": batch * tokens, "starts": batch, "rows": tokens}
        ends = np.cumsum([-(-size * _WORD // ALIGNMENT) * ALIGNMENT for size in sizes.values()]) // _WORD
        self._places = dict(zip(sizes, [0, *ends[:-1].tolist()], strict=True))
        self._staged = PinnedArray(driver, (int(ends[-1]),), np.int64)
        self._inputs = DeviceArray(driver, (int(ends[-1]),), _WORD)
        self._logits = DeviceArray(driver, (0, vocab_size), 4)
        self._copied = PinnedArray(driver, (0, vocab_size), np.float32)
        self._bound: CallShape | None = None
        self._seen: set[CallShape] = set()
        self.graphs: dict[CallShape, Graph] = {}

    def run(self, tokens: np.ndarray, starts: np.ndarray, rows: np.ndarray, slot: int) -> np.ndarray:
        """Run new tokens; return the logits of the wanted ones, [B * R, V], valid until the next run.

        Args:
            tokens: int64 [B, S].
            starts: int64 [B], the number of positions that each sequence holds.
            rows: int64 [R], indices from 0 to S-1, at least one.
            slot: the first of the adjacent slots.
        """
        shape = CallShape(slot, batch=tokens.shape[0], tokens=tokens.shape[1], rows=len(rows))
        count = shape.batch * shape.rows
        self._reserve(count)
        for name, values in (("input_ids", tokens), ("starts", starts), ("rows", rows)):
            place = self._places[name]
            self._staged.array[place : place + values.size] = values.reshape(-1)
        graph = self.graphs.get(shape)
        try:
            if graph is not None:
                graph.launch(self._stream)
            else:
                self._bind(shape)
                self._enqueue(count)
            self._driver.synchronize(self._stream)
        except BaseException:
            # The next call must not change inputs that work on the stream still reads.
            with suppress(LlmcError):
                self._driver.synchronize(self._stream)
            raise
        if graph is None and self._captures:
            self._capture(shape)
        return self._copied.array[:count]

    def forget(self) -> None:
        """Forget what depends on the addresses of caches."""
        self._bound = None
        self._seen.clear()
        for graph in self.graphs.values():
            graph.free()
        self.graphs.clear()

    def free(self) -> None:
        """Free graphs and memory, and let go of the context. A second call does nothing."""
        self.forget()
        self._context = None  # a context must not outlive its plan
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

    def _bind(self, shape: CallShape) -> None:
        """Tell the context the shapes and addresses of a call, as far as they have changed."""
        bound, self._bound = self._bound, None
        if bound == shape:
            self._bound = shape
            return
        sizes = {"input_ids": (shape.batch, shape.tokens), "starts": (shape.batch,), "rows": (shape.rows,)}
        is_new = bound is None
        for name, size in sizes.items():
            self._set_shape(name, size)
            if is_new:
                self._set_address(name, self._inputs.address + self._places[name] * _WORD)
        if is_new:
            self._set_address("logits", self._logits.address)
        for index, tensor in enumerate(self._caches.tensors):
            if bound is None or bound.batch != shape.batch:
                self._set_shape(tensor.past, (shape.batch, *tensor.shape))
            if bound is None or bound.slot != shape.slot:
                address = self._caches.address(index, shape.slot)
                self._set_address(tensor.past, address)
                self._set_address(tensor.present, address)
        self._bound = shape

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise self._plan.failed(f"take {name} of shape {list(shape)}")

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._plan.failed(f"take the memory of {name}")

    def _enqueue(self, count: int) -> None:
        """Put a call on the stream: inputs to the device, the plan, logits to the host."""
        self._driver.copy_to_device(self._inputs.address, self._staged.address, self._inputs.nbytes, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise self._plan.failed("run a plan")
        self._driver.copy_to_host(
            self._copied.address, self._logits.address, count * self._vocab_size * 4, self._stream
        )

    def _capture(self, shape: CallShape) -> None:
        """Capture a call that was made for the second time. The context has just run it, as TensorRT requires."""
        if shape not in self._seen:
            self._seen.add(shape)
            return
        try:
            graph = capture(self._driver, self._stream, lambda: self._enqueue(shape.batch * shape.rows))
        except LlmcError:
            self._captures = False  # some kernel can't be captured; calls without graphs compute the same
            return
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.pop(next(iter(self.graphs))).free()
        self.graphs[shape] = graph
