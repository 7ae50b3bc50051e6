"""Open a plan, and create execution contexts that share their activation memory."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import LlmcError
from ...cuda.driver import Driver
from ...cuda.libcuda import out_of_memory
from ...cuda.memory import DeviceArray
from .library import TensorRt
from .messages import error_log
from .runtime_cache import RuntimeCache, cache_path


@dataclass(frozen=True)
class WantedProfile:
    """A profile that a plan must have.

    Attributes:
        repeats: calls of it have the same shapes again and again.
    """

    batch: int
    tokens: int
    repeats: bool


class OpenPlan:
    """A plan that the library has loaded.

    Its contexts are used one after the other on one stream, so they share their activation memory.

    Args:
        tensors: the names that the inputs and outputs must have.
        profiles: in the plan's order.

    Attributes:
        captures: True if the library repeats calls as CUDA graphs by itself.

    Raises:
        LlmcError: PLAN_REFUSED or CUDA_MEMORY.
    """

    def __init__(
        self,
        path: Path,
        plan_hash: str,
        library: TensorRt,
        driver: Driver,
        stream: int,
        tensors: Sequence[str],
        profiles: Sequence[WantedProfile],
    ) -> None:
        self._path, self._library, self._driver = path, library, driver
        self._stream, self._profiles = stream, profiles
        self._kernels = cache_path(plan_hash, library.version, driver.device)
        self._log = error_log(library.module)
        self._runtime: Any = library.module.Runtime(self._log)
        self._memory: DeviceArray | None = None
        self._cache: RuntimeCache | None = None
        self.engine: Any = None
        self.captures = library.name == "tensorrt_rtx"
        try:
            self.engine = self._deserialize()
            self._check(tensors, profiles)
            sizes = [self.engine.get_device_memory_size_for_profile_v2(index) for index in range(len(profiles))]
            self._memory = DeviceArray(driver, (max(sizes),), 1)
        except BaseException:
            self.close()
            raise

    def create_context(self, index: int) -> Any:
        """Return a new execution context of the library for a profile.

        Raises:
            LlmcError: PLAN_REFUSED.
        """
        assert self._memory is not None, "the plan has been closed"
        context = self.engine.create_execution_context(self._config(self._profiles[index]))
        if context is None:
            raise self._refused(self._log.error or "it can't create a context")
        if not context.set_optimization_profile_async(index, self._stream):
            raise self._refused(self._log.error or f"it can't use profile {index}")
        context.set_device_memory(self._memory.address, self._memory.nbytes)
        self._driver.synchronize(self._stream)
        return context

    def failed(self, what: str) -> LlmcError:
        """Return the error of a call of the library that failed, with the library's own message."""
        reason, self._log.error = self._log.error, None
        return LlmcError(
            "PLAN_FAILED",
            f"{self._name} failed to {what}: {reason or 'it gives no reason'}.",
            "Check the artifact on this machine: llmc verify DIR",
        )

    def store_cache(self) -> None:
        """Keep compiled kernels for the next process, if the library compiles any."""
        if self._cache is not None:
            self._cache.store()

    def close(self) -> None:
        """Free the plan and the activation memory, after all contexts. A second call does nothing."""
        # A plan must not outlive its runtime.
        self.engine, self._cache = None, None
        self._runtime = None
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    @property
    def _name(self) -> str:
        return f"{self._library.name} {self._library.version}"

    def _deserialize(self) -> Any:
        size, free = self._path.stat().st_size, self._driver.free_memory()
        if size > free:  # the library would only say that it can't open the plan
            raise out_of_memory(size, free, self._driver.device)
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._refused(self._log.error or "it gives no reason")
        return engine

    def _check(self, tensors: Sequence[str], profiles: Sequence[WantedProfile]) -> None:
        """Refuse a plan that was not built from the artifact's graph."""
        has = {self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)}
        if has != set(tensors):
            unlike = ", ".join(sorted(has ^ set(tensors))[:3])
            raise self._refused(f"its inputs and outputs are not those of the artifact ({unlike})")
        count = self.engine.num_optimization_profiles
        if count != len(profiles):
            raise self._refused(f"it has {count} profiles, not {len(profiles)}")
        for index, profile in enumerate(profiles):
            batch, tokens = self.engine.get_tensor_profile_shape("input_ids", index)[2]
            if batch < profile.batch or tokens < profile.tokens:
                wanted = f"{profile.batch} of {profile.tokens}"
                raise self._refused(
                    f"its profile {index} is for {batch} sequences of {tokens} tokens, not for {wanted}"
                )

    def _config(self, profile: WantedProfile) -> Any:
        module, config = self._library.module, self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.captures:
            # This library compiles the last kernels here. While it runs, it replaces kernels and captures them again.
            if self._cache is None:
                self._cache = RuntimeCache(config.create_runtime_cache(), self._kernels)
            config.set_runtime_cache(self._cache.cache)
            strategy = module.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if profile.repeats else strategy.DISABLED
        return config

    def _refused(self, why: str) -> LlmcError:
        return LlmcError(
            "PLAN_REFUSED",
            f"{self._name} can't open {self._path.name}: {why}.",
            f"Build the plan again on this machine: llmc finalize {self._path.parent}",
        )
