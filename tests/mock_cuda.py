"""A CUDA driver whose device memory is host memory, and which refuses what a real one would not survive.

Work on a stream is done when somebody waits for it, not before. So a missing wait is seen: what should have been
computed is not there. Fresh memory is full of ones, which are NaN in every float format.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmc.errors import LlmcError
from llmc.runtimes.cuda.driver import Device
from llmc.runtimes.cuda.libcuda import out_of_memory

Work = Callable[[], None]


class Fault(AssertionError):
    """A use of memory or of a handle that a real driver would not notice, or not survive."""


@dataclass
class Block:
    """Allocated memory."""

    kind: str
    address: int
    bytes: np.ndarray
    is_freed: bool = False


@dataclass
class Stream:
    """Work that is not done yet; `recorded` is that of a capture, and None while there is no capture."""

    queue: list[Work] = field(default_factory=list)
    recorded: list[Work] | None = None
    is_broken: bool = False


class MockDriver:
    """See `Driver`.

    Args:
        memory: bytes of the device.

    Attributes:
        calls: how often each method was called that puts work on a stream or a graph.
        captures_work: False: every capture fails at its end.
        alignment: every address that `allocate` returns is a multiple of this.
    """

    alignment = 256

    def __init__(self, memory: int = 1 << 30, sm: str = "8.9", name: str = "Mock GPU", driver: str = "13.0") -> None:
        self.device = Device(0, name, sm, memory, driver)
        self.calls: Counter[str] = Counter()
        self.captures_work = True
        self._blocks: list[Block] = []  # freed ones stay, so that no address is used twice
        self._streams: dict[int, Stream] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}
        self._events: dict[int, list[bool]] = {}
        self._handles = itertools.count(1)

    @property
    def live(self) -> dict[str, int]:
        """The number of objects by kind that exist; empty if everything was freed."""
        kinds = Counter(block.kind for block in self._blocks if not block.is_freed)
        others = {
            "stream": self._streams, "graph": self._graphs, "executable": self._executables, "event": self._events
        }  # fmt: skip
        return dict(kinds) | {name: len(objects) for name, objects in others.items() if objects}

    @property
    def used(self) -> int:
        """Bytes of device memory in use."""
        return sum(len(block.bytes) for block in self._blocks if block.kind == "device" and not block.is_freed)

    def view(self, kind: str, address: int, nbytes: int) -> np.ndarray:
        """Return bytes of memory, which must lie in one allocation."""
        for block in self._blocks:
            if block.address <= address < block.address + len(block.bytes):
                if block.is_freed:
                    raise Fault(f"{kind} memory is used after it was freed")
                if block.kind != kind:
                    raise Fault(f"{block.kind} memory is used as {kind} memory")
                start = address - block.address
                if nbytes < 0 or start + nbytes > len(block.bytes):
                    raise Fault(f"{nbytes} bytes at {start} are out of the bounds of {len(block.bytes)}")
                return block.bytes[start : start + nbytes]
        raise Fault(f"there is no {kind} memory at {address:#x}")

    def put(self, stream: int, work: Work) -> None:
        """Put work on a stream, or record it."""
        found = self._stream(stream)
        (found.queue if found.recorded is None else found.recorded).append(work)

    def make_current(self) -> None:
        self.calls["make_current"] += 1

    def free_memory(self) -> int:
        return self.device.memory - self.used

    def allocate(self, nbytes: int) -> int:
        self._not_captured("cuMemAlloc")
        if nbytes > self.free_memory():
            raise out_of_memory(nbytes, self.free_memory(), self.device)
        return self._allocate("device", nbytes)

    def free(self, address: int) -> None:
        self._not_captured("cuMemFree")
        self._work_off()
        self._free("device", address)

    def allocate_pinned(self, nbytes: int) -> int:
        self._not_captured("cuMemHostAlloc")
        return self._allocate("pinned", nbytes)

    def free_pinned(self, address: int) -> None:
        self._not_captured("cuMemFreeHost")
        self._free("pinned", address)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self.view("device", address, nbytes)
        self.put(stream, lambda: self.view("device", address, nbytes).fill(value))

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._copy(("device", target), ("pinned", source), nbytes, stream)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._copy(("pinned", target), ("device", source), nbytes, stream)

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        if abs(target - source) < nbytes:
            raise Fault("a copy overlaps itself")
        self._copy(("device", target), ("device", source), nbytes, stream)

    def copy_rows(self, target: int, source: int, nbytes: int, pitch: int, rows: int, stream: int) -> None:
        if nbytes > pitch:
            raise Fault("rows overlap")
        for row in range(rows):
            self.copy_on_device(target + row * pitch, source + row * pitch, nbytes, stream)

    def create_stream(self) -> int:
        return self._add(self._streams, Stream())

    def destroy_stream(self, stream: int) -> None:
        self._not_captured("cuStreamDestroy")
        self.synchronize(stream)
        self._take(self._streams, stream, "stream")

    def synchronize(self, stream: int) -> None:
        self._not_captured("cuStreamSynchronize")
        self.calls["synchronize"] += 1
        queue = self._stream(stream).queue
        while queue:
            queue.pop(0)()

    def create_event(self) -> int:
        return self._add(self._events, [False])

    def destroy_event(self, event: int) -> None:
        self._take(self._events, event, "event")

    def record_event(self, event: int, stream: int) -> None:
        occurred = self._find(self._events, event, "event")
        occurred[0] = False
        self.put(stream, lambda: occurred.__setitem__(0, True))

    def wait_for_event(self, stream: int, event: int) -> None:
        occurred = self._find(self._events, event, "event")

        def wait() -> None:
            if not occurred[0]:
                self._work_off()

        self.put(stream, wait)

    def synchronize_event(self, event: int) -> None:
        self._not_captured("cuEventSynchronize")
        self._find(self._events, event, "event")
        self._work_off()

    def elapsed_ms(self, first: int, second: int) -> float:
        for event in (first, second):
            if not self._find(self._events, event, "event")[0]:
                raise self.failed("cuEventElapsedTime", "CUDA_ERROR_NOT_READY")
        return 1.0

    def begin_capture(self, stream: int) -> None:
        self.calls["begin_capture"] += 1
        found = self._stream(stream)
        if found.recorded is not None:
            raise self.failed("cuStreamBeginCapture", "CUDA_ERROR_ILLEGAL_STATE")
        found.recorded, found.is_broken = [], not self.captures_work

    def end_capture(self, stream: int) -> int:
        found = self._stream(stream)
        if found.recorded is None:
            raise self.failed("cuStreamEndCapture", "CUDA_ERROR_ILLEGAL_STATE")
        recorded, found.recorded = found.recorded, None
        if found.is_broken:
            raise self.failed("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        return self._add(self._graphs, recorded)

    def is_capturing(self, stream: int) -> bool:
        """True between the begin and the end of a capture."""
        return self._stream(stream).recorded is not None

    def instantiate(self, graph: int) -> int:
        return self._add(self._executables, list(self._find(self._graphs, graph, "graph")))

    def launch_graph(self, executable: int, stream: int) -> None:
        self.calls["launch_graph"] += 1
        for work in self._find(self._executables, executable, "executable"):
            self.put(stream, work)

    def destroy_graph(self, graph: int) -> None:
        self._take(self._graphs, graph, "graph")

    def destroy_executable(self, executable: int) -> None:
        self._take(self._executables, executable, "executable")

    def failed(self, name: str, error: str) -> LlmcError:
        """Return the error of a failed call."""
        return LlmcError("CUDA_FAILED", f"CUDA's {name} failed on {self.device.name}: {error}.", "Try again.")

    def _copy(self, target: tuple[str, int], source: tuple[str, int], nbytes: int, stream: int) -> None:
        def copy() -> None:
            self.view(*target, nbytes)[:] = self.view(*source, nbytes)

        self.view(*target, nbytes), self.view(*source, nbytes)
        self.put(stream, copy)

    def _allocate(self, kind: str, nbytes: int) -> int:
        if nbytes < 1:
            raise self.failed("cuMemAlloc", "CUDA_ERROR_INVALID_VALUE")
        whole = np.full(nbytes + self.alignment, 0xFF, np.uint8)
        start = -whole.ctypes.data % self.alignment
        block = Block(kind, whole.ctypes.data + start, whole[start : start + nbytes])
        self._blocks.append(block)
        return block.address

    def _free(self, kind: str, address: int) -> None:
        for block in self._blocks:
            if block.address == address and block.kind == kind:
                if block.is_freed:
                    raise Fault(f"{kind} memory is freed twice")
                block.is_freed = True
                ctypes.memset(address, 0xFF, len(block.bytes))
                return
        raise Fault(f"{kind} memory is freed that was not allocated")

    def _work_off(self) -> None:
        for stream in list(self._streams):
            self.synchronize(stream)

    def _not_captured(self, name: str) -> None:
        """Refuse a call that is not allowed during a capture, and spoil the capture, as CUDA does."""
        capturing = [stream for stream in self._streams.values() if stream.recorded is not None]
        for stream in capturing:
            stream.is_broken = True
        if capturing:
            raise self.failed(name, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def _stream(self, stream: int) -> Stream:
        found: Stream = self._find(self._streams, stream, "stream")
        return found

    def _add(self, objects: dict, new: object) -> int:
        handle = next(self._handles)
        objects[handle] = new
        return handle

    def _find(self, objects: dict, handle: int, kind: str):
        if handle not in objects:
            raise Fault(f"there is no {kind} {handle}")
        return objects[handle]

    def _take(self, objects: dict, handle: int, kind: str) -> None:
        self._find(objects, handle, kind)
        del objects[handle]
