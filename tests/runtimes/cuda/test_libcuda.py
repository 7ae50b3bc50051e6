"""The calls of the driver arrive with the right arguments, and its errors become one sentence.

The C functions are callbacks with the types that are declared, so ctypes converts every argument.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.errors import LlmcError
from llmc.runtimes.cuda import libcuda
from llmc.runtimes.cuda.libcuda import FUNCTIONS, Copy2d, LibCuda

NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 100: b"CUDA_ERROR_NO_DEVICE"}
# What each function stores at its first argument.
STORED = {
    "cuDriverGetVersion": 13010, "cuDeviceGetCount": 1, "cuDeviceGet": 0, "cuDeviceTotalMem_v2": 8 << 30,
    "cuDevicePrimaryCtxRetain": 11, "cuMemAlloc_v2": 4096, "cuMemHostAlloc": 8192, "cuStreamCreate": 21,
    "cuEventCreate": 31, "cuGraphInstantiateWithFlags": 51, "cuEventElapsedTime": 2.5,
}  # fmt: skip


class Library:
    """C functions that record their calls.

    Attributes:
        statuses: by name, the status that a function returns.
    """

    def __init__(self, **statuses: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.statuses = statuses
        self.stored: dict[str, float] = dict(STORED)
        self.functions = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._function(name)) for name, types in FUNCTIONS.items()
        }

    def last(self, name: str) -> tuple[Any, ...]:
        return next(call[1:] for call in reversed(self.calls) if call[0] == name)

    def _function(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            seen = list(arguments)
            if name == "cuMemcpy2DAsync_v2":
                copied = Copy2d.from_buffer_copy(arguments[0].contents)
                seen[0] = {field: getattr(copied, field) for field in vars(Copy2d) if not field.startswith("_")}
            self.calls.append((name, *seen))
            if status := self.statuses.get(name, 0):
                return status
            if name in self.stored:
                arguments[0][0] = self.stored[name]
            elif name == "cuGetErrorName" and arguments[0] in NAMES:
                arguments[1][0] = NAMES[arguments[0]]
            elif name == "cuDeviceGetName":
                ctypes.memmove(arguments[0], b"Mock GPU", 9)
            elif name == "cuDeviceGetAttribute":
                arguments[0][0] = {75: 12, 76: 1}[arguments[1]]
            elif name == "cuMemGetInfo_v2":
                arguments[0][0], arguments[1][0] = 3 << 30, 8 << 30
            elif name == "cuStreamEndCapture":
                arguments[1][0] = 41
            return 0

        return call


def test_the_device() -> None:
    driver = LibCuda(Library().functions)
    device = driver.device
    assert (device.index, device.name, device.sm, device.memory) == (0, "Mock GPU", "12.1", 8 << 30)
    assert device.driver.startswith("13.1") and driver.free_memory() == 3 << 30


def test_calls() -> None:
    library = Library()
    driver = LibCuda(library.functions)
    assert driver.allocate(64) == 4096 and library.last("cuMemAlloc_v2")[1] == 64
    assert driver.allocate_pinned(32) == 8192 and library.last("cuMemHostAlloc")[1:] == (32, 0)
    stream = driver.create_stream()
    assert stream == 21 and library.last("cuStreamCreate")[1] == 1
    far = 0x7F00_0000_1000  # more than 32 bits
    driver.fill(far, 7, 64, stream)
    assert library.last("cuMemsetD8Async") == (far, 7, 64, 21)
    driver.copy_to_device(far, 8192, 16, stream)
    assert library.last("cuMemcpyHtoDAsync_v2") == (far, 8192, 16, 21)
    driver.copy_to_host(8192, far, 16, stream)
    assert library.last("cuMemcpyDtoHAsync_v2") == (8192, far, 16, 21)
    driver.copy_on_device(far, 2 * far, 16, stream)
    assert library.last("cuMemcpyDtoDAsync_v2") == (far, 2 * far, 16, 21)
    driver.copy_rows(far, 2 * far, nbytes=16, pitch=64, rows=3, stream=stream)
    copy, on = library.last("cuMemcpy2DAsync_v2")
    assert on == 21 and (copy["target"], copy["source"], copy["width"], copy["height"]) == (far, 2 * far, 16, 3)
    assert copy["source_pitch"] == copy["target_pitch"] == 64 and copy["source_kind"] == copy["target_kind"] == 2
    assert not any(copy[name] for name in ("source_x", "source_y", "target_x", "target_y", "source_host"))
    driver.begin_capture(stream)
    assert library.last("cuStreamBeginCapture_v2") == (21, 1)
    graph = driver.end_capture(stream)
    executable = driver.instantiate(graph)
    assert (graph, executable) == (41, 51) and library.last("cuGraphInstantiateWithFlags")[1:] == (41, 0)
    driver.launch_graph(executable, stream)
    assert library.last("cuGraphLaunch") == (51, 21)
    event = driver.create_event()
    driver.record_event(event, stream)
    assert library.last("cuEventRecord") == (31, 21)
    driver.wait_for_event(stream, event)
    assert library.last("cuStreamWaitEvent") == (21, 31, 0)
    driver.synchronize_event(event)
    assert driver.elapsed_ms(event, event) == 2.5
    for call, name, argument in [
        (driver.destroy_graph, "cuGraphDestroy", 41), (driver.destroy_executable, "cuGraphExecDestroy", 51),
        (driver.destroy_event, "cuEventDestroy_v2", 31), (driver.synchronize, "cuStreamSynchronize", 21),
        (driver.destroy_stream, "cuStreamDestroy_v2", 21), (driver.free, "cuMemFree_v2", far),
        (driver.free_pinned, "cuMemFreeHost", 8192),
    ]:  # fmt: skip
        call(argument)
        assert library.last(name) == (argument,)
    assert library.last("cuCtxSetCurrent") == (11,) and driver.free_memory() == 3 << 30
    assert {call[0] for call in library.calls} >= set(FUNCTIONS) - {"cuGetErrorName"}


def test_the_struct_of_a_copy_is_that_of_cuda() -> None:
    """`sizeof(CUDA_MEMCPY2D)`, and the offsets of its fields after padding."""
    assert ctypes.sizeof(Copy2d) == 128
    offsets = {name: getattr(Copy2d, name).offset for name in ("source_kind", "source", "target_kind", "width")}
    assert offsets == {"source_kind": 16, "source": 32, "target_kind": 72, "width": 112}


def refused(call: Callable[[], Any]) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        call()
    assert caught.value.hint and "\n" not in str(caught.value)
    return caught.value


def test_a_failed_call_has_the_name_that_cuda_gives_it() -> None:
    library = Library()
    driver = LibCuda(library.functions)
    library.statuses = {"cuMemFree_v2": 1, "cuStreamSynchronize": 999}
    error = refused(lambda: driver.free(1))
    assert error.code == "CUDA_FAILED" and "cuMemFree_v2 failed" in error.what
    assert "CUDA_ERROR_INVALID_VALUE" in error.what
    assert "status 999" in refused(lambda: driver.synchronize(1)).what


def test_memory_that_is_not_there() -> None:
    library = Library()
    driver = LibCuda(library.functions)
    library.statuses = {"cuMemAlloc_v2": 2}
    error = refused(lambda: driver.allocate(5 << 30))
    assert error.code == "CUDA_MEMORY" and "5.37 GB" in error.what and "3.22 GB of 8.59 GB are free" in error.what


def test_machines_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(lambda: LibCuda(Library(cuInit=100).functions))
    assert error.code == "CUDA_MISSING" and error.exit_status == 3 and "CUDA_ERROR_NO_DEVICE" in error.what
    library = Library()
    library.stored["cuDeviceGetCount"] = 0
    assert "finds no GPUs" in refused(lambda: LibCuda(library.functions)).what
    assert "finds 1 GPU." in refused(lambda: LibCuda(Library().functions, index=1)).what
    libcuda.open_driver.cache_clear()
    monkeypatch.setattr(libcuda, "LIBRARY", "no-such-library.so")
    error = refused(libcuda.open_driver)
    assert error.code == "CUDA_MISSING" and "needs an NVIDIA GPU and its driver" in error.what


def test_a_library_without_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    libcuda.open_driver.cache_clear()
    monkeypatch.setattr(libcuda, "LIBRARY", None)  # the functions of the process itself
    assert refused(libcuda.open_driver).code == "CUDA_MISSING"


def test_the_driver_is_opened_where_there_is_one() -> None:
    libcuda.open_driver.cache_clear()
    if Path("/dev/nvidia0").exists():
        assert libcuda.open_driver().device.memory > 0
    else:
        assert refused(libcuda.open_driver).code == "CUDA_MISSING"
