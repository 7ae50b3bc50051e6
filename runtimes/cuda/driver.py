"""The part of CUDA's driver API that the engines use, as an interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        index: among the GPUs that the process sees.
        sm: the compute capability, such as "8.9".
        memory: bytes.
        driver: the version of CUDA that the driver supports, such as "13.0", and the driver's own where it is known.
    """

    index: int
    name: str
    sm: str
    memory: int
    driver: str


class Driver(Protocol):
    """Memory, streams and graphs of one device.

    Addresses and handles are whole numbers. Calls with a stream return before the work is done, and work on one stream
    is done in order. Between `begin_capture` and `end_capture`, work on that stream is recorded instead of done, and
    calls that allocate, free or wait are not allowed.

    Every call may raise CUDA_FAILED, with CUDA's own name of the error.
    """

    @property
    def device(self) -> Device: ...

    def make_current(self) -> None:
        """Let calls of this thread use the device, also those that libraries make. Each thread needs it."""

    def free_memory(self) -> int:
        """Return how many bytes of the device's memory are free."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory; the address is a multiple of 256.

        Raises:
            LlmcError: CUDA_MEMORY if it does not fit.
        """
        ...

    def free(self, address: int) -> None:
        """Free device memory, after all work that uses it."""

    def allocate_pinned(self, nbytes: int) -> int:
        """Allocate memory of the host that copies use directly, and that a copy may still use after its call."""
        ...

    def free_pinned(self, address: int) -> None:
        """Free memory of `allocate_pinned`. No copy may use it any more."""

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        """Set bytes of device memory to `value`."""

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy pinned memory to device memory."""

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy device memory to pinned memory."""

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy device memory. The two ranges don't overlap."""

    def copy_rows(self, target: int, source: int, nbytes: int, pitch: int, rows: int, stream: int) -> None:
        """Copy `nbytes` of each of `rows` rows on the device, whose beginnings are `pitch` bytes apart in both."""

    def create_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Wait until the work on a stream is done."""

    def create_event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record_event(self, event: int, stream: int) -> None:
        """Let an event occur when the work that is now on a stream is done."""

    def wait_for_event(self, stream: int, event: int) -> None:
        """Let work that is put on a stream from now on begin after an event."""

    def synchronize_event(self, event: int) -> None:
        """Wait until an event has occurred."""

    def elapsed_ms(self, first: int, second: int) -> float:
        """Return the milliseconds between two events that have occurred."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Record the work that is put on a stream from now on."""

    def end_capture(self, stream: int) -> int:
        """Return the graph of the recorded work.

        Raises:
            LlmcError: CUDA_FAILED if a call was not allowed during the capture. The stream is usable again.
        """
        ...

    def instantiate(self, graph: int) -> int:
        """Return an executable graph."""
        ...

    def launch_graph(self, executable: int, stream: int) -> None:
        """Put the work of an executable graph on a stream."""

    def destroy_graph(self, graph: int) -> None: ...

    def destroy_executable(self, executable: int) -> None: ...
