"""Where the engine computes: a CPU, or an NVIDIA GPU by ONNX Runtime's CUDA provider.

All that differs between them is here: the provider, the memory of the caches, and what the engine says of itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from ....errors import LlmcError
from ...artifact.manifest import CacheSpec, Manifest
from ...cuda.driver import Driver
from ...cuda.libcuda import open_driver
from ..cores import physical_cores
from ..device_caches import DeviceCaches
from ..spec import EngineSpec
from .caches import DTYPES, BoundTensor, HostCaches

CUDA_PROVIDER = "CUDAExecutionProvider"
# ONNX's numbers of element types.
_ELEMENTS = {"fp16": 10, "bf16": 16}


class Caches(Protocol):
    """KV caches in the memory of a device; see `HostCaches`."""

    def open(self, kept: np.ndarray) -> None: ...

    def bound(self, slot: int, batch: int) -> Iterator[BoundTensor]: ...

    def copy_slot(self, source: int, target: int, length: int) -> None: ...

    def free(self) -> None: ...


class Device(Protocol):
    """A device that sessions compute on.

    Attributes:
        name: as ONNX Runtime calls the memory of the caches.
        longest_run: the most tokens of a sequence in one run.
        threads: those of a session on the CPU.
    """

    name: str
    longest_run: int
    threads: int

    def spec(self, manifest: Manifest) -> EngineSpec: ...

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """Return the providers of a session, with their options; the first one is required."""
        ...

    def make_caches(self, specs: Sequence[CacheSpec]) -> Caches: ...

    def close(self) -> None:
        """Free what the device holds, after the caches. A second call does nothing."""


class Cpu:
    """A CPU; see `Device`.

    Args:
        threads: of the matmuls; by default one per physical core.
        dtypes: as `HostCaches` takes them.
    """

    name = "cpu"
    # Attention computes the scores of all pairs of a run, also of masked ones, so several shorter runs need less work.
    # Longer runs would not make matmuls more efficient.
    longest_run = 256

    def __init__(self, threads: int | None = None, dtypes: Mapping[str, Any] = DTYPES) -> None:
        self.threads = threads or physical_cores()
        self._dtypes = dtypes

    def spec(self, manifest: Manifest) -> EngineSpec:
        return EngineSpec(
            vocab_size=manifest.model.vocab_size,
            max_seq_len=manifest.max_seq_len,
            threads=self.threads,
            rollback=manifest.rollback,
        )

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        return [("CPUExecutionProvider", {})]

    def make_caches(self, specs: Sequence[CacheSpec]) -> Caches:
        return HostCaches(specs, self._dtypes)

    def close(self) -> None:
        pass


class Cuda:
    """The first NVIDIA GPU; see `Device`.

    Args:
        driver: its driver.

    Raises:
        LlmcError: CUDA_MISSING without a GPU; ORT_WITHOUT_CUDA if ONNX Runtime can't use it.
    """

    name = "cuda"
    # What ONNX Runtime computes on the CPU is about shapes.
    threads = 1
    # Flash attention needs no memory for scores, and matmuls need many tokens to be efficient.
    longest_run = 2048

    def __init__(self, driver: Driver | None = None) -> None:
        # A machine without a GPU is told so, whatever else it lacks.
        self._driver = open_driver() if driver is None else driver
        if CUDA_PROVIDER not in ort.get_available_providers():
            raise without_cuda("it is the one for CPUs")
        if hasattr(ort, "preload_dlls"):  # finds CUDA's libraries among Python's packages
            ort.preload_dlls()
        self._driver.make_current()
        self._stream: int | None = self._driver.create_stream()

    def spec(self, manifest: Manifest) -> EngineSpec:
        device = self._driver.device
        return EngineSpec(
            vocab_size=manifest.model.vocab_size,
            max_seq_len=manifest.max_seq_len,
            device=f"cuda:{device.index}",
            rollback=manifest.rollback,
            platform=(device.name, f"CUDA {device.driver}", f"onnxruntime {ort.__version__}"),
        )

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        options = {
            "device_id": str(self._driver.device.index),
            # By default its memory grows by powers of two, and leaves less for caches.
            "arena_extend_strategy": "kSameAsRequested",
            # What the graph computes in float32, such as the choice of experts, is meant to be exact.
            "use_tf32": "0",
        }
        return [(CUDA_PROVIDER, options), ("CPUExecutionProvider", {})]

    def make_caches(self, specs: Sequence[CacheSpec]) -> Caches:
        assert self._stream is not None
        return _CudaCaches(self._driver, self._stream, specs)

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            self._driver.make_current()
            self._driver.destroy_stream(stream)


class _CudaCaches:
    """See `Caches`. ONNX Runtime waits at the end of a run, so these copies never meet one that reads or writes."""

    def __init__(self, driver: Driver, stream: int, specs: Sequence[CacheSpec]) -> None:
        self._driver, self._stream = driver, stream
        # Slots are next to each other, so that one run can serve them.
        self._caches = DeviceCaches(driver, stream, specs, alignment=1)
        self._elements = [_ELEMENTS[spec.dtype] for spec in specs for _ in ("key", "value")]

    def open(self, kept: np.ndarray) -> None:
        self._driver.make_current()
        self._caches.open(len(kept))

    def bound(self, slot: int, batch: int) -> Iterator[BoundTensor]:
        for i, (tensor, element) in enumerate(zip(self._caches.tensors, self._elements, strict=True)):
            shape = batch, *tensor.shape
            yield BoundTensor(tensor.past, tensor.present, element, shape, self._caches.address(i, slot))

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self._driver.make_current()
        self._caches.copy_slot(source, target, length)
        self._driver.synchronize(self._stream)

    def free(self) -> None:
        self._driver.make_current()
        self._caches.free()


def open_device(name: str, threads: int | None) -> Device:
    """Return the device that an artifact names.

    Raises:
        LlmcError: CUDA_MISSING or ORT_WITHOUT_CUDA.
    """
    return Cuda() if name == "cuda" else Cpu(threads)


def without_cuda(why: str) -> LlmcError:
    """Return the refusal of an ONNX Runtime that can't compute on GPUs."""
    return LlmcError(
        "ORT_WITHOUT_CUDA",
        f"The installed ONNX Runtime {ort.__version__} can't compute on GPUs: {why}.",
        "Install the one for GPUs instead: pip uninstall onnxruntime, then pip install 'llmc[gpu]'. Its libraries of "
        "CUDA: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    )
