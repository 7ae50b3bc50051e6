"""CUDA's driver API by ctypes. Nothing but NVIDIA's driver needs to be installed."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from ...errors import LlmcError
from .driver import Device

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class Copy2d(ctypes.Structure):
    """CUDA_MEMCPY2D: a copy of rows."""

    _fields_ = [
        ("source_x", c_size_t),
        ("source_y", c_size_t),
        ("source_kind", c_int),
        ("source_host", c_void_p),
        ("source", c_uint64),
        ("source_array", c_void_p),
        ("source_pitch", c_size_t),
        ("target_x", c_size_t),
        ("target_y", c_size_t),
        ("target_kind", c_int),
        ("target_host", c_void_p),
        ("target", c_uint64),
        ("target_array", c_void_p),
        ("target_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    ]


# The functions that are called, with the types of their arguments. Each returns a status.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemcpy2DAsync_v2": (POINTER(Copy2d), c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
}

# Statuses and other numbers of cuda.h.
OUT_OF_MEMORY = 2
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_STREAM_NON_BLOCKING = 1
_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE
# What other threads call, such as another engine, can't break a capture.
_CAPTURE_THREAD_LOCAL = 1

_DRIVER_VERSION = Path("/sys/module/nvidia/version")


class LibCuda:
    """A device by CUDA's driver; see `Driver`.

    It uses the device's primary context, as CUDA's runtime does, so that libraries share its memory. The context stays
    until the process ends.

    Args:
        functions: the functions of `FUNCTIONS` by name.
        index: the device.

    Raises:
        LlmcError: CUDA_MISSING if there is no such device.
    """

    def __init__(self, functions: Mapping[str, Any], index: int = 0) -> None:
        self._functions = functions
        self._device = Device(index, f"GPU {index}", sm="", memory=0, driver="")  # until its name is known
        self._initialize(index)
        handle, self._context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(handle), index)
        self._device = self._describe(handle.value, index)
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), handle)
        self.make_current()

    @property
    def device(self) -> Device:
        return self._device

    def make_current(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def free_memory(self) -> int:
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        address = c_uint64()
        if status := self._functions["cuMemAlloc_v2"](byref(address), nbytes):
            if status == OUT_OF_MEMORY:
                raise out_of_memory(nbytes, self.free_memory(), self._device)
            raise self._failed("cuMemAlloc_v2", status)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def allocate_pinned(self, nbytes: int) -> int:
        return self._create("cuMemHostAlloc", nbytes, 0)

    def free_pinned(self, address: int) -> None:
        # This may be called in any thread, when the last array over the memory is collected.
        self.make_current()
        self._call("cuMemFreeHost", address)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", address, value, nbytes, stream)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync_v2", target, source, nbytes, stream)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", target, source, nbytes, stream)

    def copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync_v2", target, source, nbytes, stream)

    def copy_rows(self, target: int, source: int, nbytes: int, pitch: int, rows: int, stream: int) -> None:
        both = {"source_kind": _ON_DEVICE, "source_pitch": pitch, "target_kind": _ON_DEVICE, "target_pitch": pitch}
        copy = Copy2d(source=source, target=target, width=nbytes, height=rows, **both)
        self._call("cuMemcpy2DAsync_v2", byref(copy), stream)

    def create_stream(self) -> int:
        return self._create("cuStreamCreate", _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self) -> int:
        return self._create("cuEventCreate", 0)

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", event)

    def record_event(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def wait_for_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed_ms(self, first: int, second: int) -> float:
        elapsed = c_float()
        self._call("cuEventElapsedTime", byref(elapsed), first, second)
        return elapsed.value

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        graph = c_void_p()
        self._call("cuStreamEndCapture", stream, byref(graph))
        return int(graph.value or 0)

    def instantiate(self, graph: int) -> int:
        return self._create("cuGraphInstantiateWithFlags", graph, 0)

    def launch_graph(self, executable: int, stream: int) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphDestroy", graph)

    def destroy_executable(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", executable)

    def _initialize(self, index: int) -> None:
        count = c_int()
        status = self._functions["cuInit"](0) or self._functions["cuDeviceGetCount"](byref(count))
        if status:
            raise missing(f"NVIDIA's driver reports {self._error_name(status)}")
        if index >= count.value:
            raise missing(f"NVIDIA's driver finds {count.value or 'no'} GPU{'' if count.value == 1 else 's'}")

    def _describe(self, handle: int, index: int) -> Device:
        name, memory, version = ctypes.create_string_buffer(256), c_size_t(), c_int()
        self._call("cuDeviceGetName", name, len(name), handle)
        self._call("cuDeviceTotalMem_v2", byref(memory), handle)
        self._call("cuDriverGetVersion", byref(version))
        parts = [c_int(), c_int()]
        for part, attribute in zip(parts, (_MAJOR, _MINOR), strict=True):
            self._call("cuDeviceGetAttribute", byref(part), attribute, handle)
        sm = ".".join(str(part.value) for part in parts)
        return Device(index, name.value.decode(errors="replace"), sm, memory.value, _driver_version(version.value))

    def _create(self, name: str, *arguments: Any) -> int:
        """Call a function that stores a handle or an address at its first argument; return it."""
        created = c_void_p()
        self._call(name, byref(created), *arguments)
        return int(created.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := self._functions[name](*arguments):
            raise self._failed(name, status)

    def _failed(self, name: str, status: int) -> LlmcError:
        return LlmcError(
            "CUDA_FAILED",
            f"CUDA's {name} failed on {self._device.name}: {self._error_name(status)}.",
            "Load the artifact again. If it fails again, update NVIDIA's driver and check the GPU: nvidia-smi",
        )

    def _error_name(self, status: int) -> str:
        name = c_char_p()
        self._functions["cuGetErrorName"](status, byref(name))
        return (name.value or b"status %d" % status).decode()


@functools.cache
def open_driver(index: int = 0) -> LibCuda:
    """Open a device.

    Raises:
        LlmcError: CUDA_MISSING if there is no driver or no such device.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
        functions = {name: getattr(library, name) for name in FUNCTIONS}
    except (OSError, AttributeError) as error:
        raise missing(f"NVIDIA's driver can't be opened: {error}") from None
    for name, types in FUNCTIONS.items():
        functions[name].argtypes, functions[name].restype = types, c_int
    return LibCuda(functions, index)


def missing(why: str) -> LlmcError:
    """Return the refusal of a machine without a GPU."""
    return LlmcError(
        "CUDA_MISSING",
        f"This needs an NVIDIA GPU and its driver: {why}.",
        "Use a machine with an NVIDIA GPU, or compile for another target: llmc compile MODEL -o DIR --target TARGET",
    )


def out_of_memory(nbytes: int, free: int, device: Device) -> LlmcError:
    """Return the refusal of an allocation."""
    return LlmcError(
        "CUDA_MEMORY",
        f"{device.name} has no room for {_size(nbytes)}: {_size(free)} of {_size(device.memory)} are free.",
        "Serve fewer sequences at once, end other programs on the GPU, or compile with a smaller --max-seq-len.",
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _driver_version(number: int) -> str:
    version = f"{number // 1000}.{number % 1000 // 10}"
    try:
        return f"{version} ({_DRIVER_VERSION.read_text().strip()})"
    except OSError:
        return version
