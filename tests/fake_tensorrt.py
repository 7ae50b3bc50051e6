"""A library module that runs plans on a `MockDriver`: a plan names an ONNX graph, which ONNX Runtime computes.

It has the classes and methods of TensorRT that the engine uses, keeps TensorRT's rules about shapes, addresses and
captures, and holds memory of the driver, so that what is not freed is seen.
"""

from __future__ import annotations

import enum
import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from mock_cuda import Fault, MockDriver

from llmc.runtimes.engines.tensorrt.library import TensorRt
from llmc.runtimes.engines.tensorrt.section import Library, Profile

_DTYPES = {"tensor(int64)": np.int64, "tensor(float16)": np.float16, "tensor(float)": np.float32}
ACTIVATIONS = (4096, 1024)  # bytes of each profile


def plan_bytes(graph: Path, *profiles: Profile) -> bytes:
    """Return a plan."""
    sizes = [[profile.batch, profile.tokens] for profile in profiles]
    return json.dumps({"graph": str(graph), "profiles": sizes}).encode()


@functools.cache
def session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # a warning for each cache that it doesn't update in place
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class FakeTensorRt:
    """Makes a library over a driver.

    Attributes:
        calls: how often contexts did what.
        fails: the name of a method of the contexts that refuses from now on, or None.
        captures_work: False: contexts can't be captured.
        caches: the contents of the runtime caches that were read.
        strategies: the CUDA graph strategy of each context, with TensorRT for RTX.
    """

    def __init__(self, driver: MockDriver, name: Library = "tensorrt", version: str = "10.15.1.29") -> None:
        self.driver, self.name, self.version = driver, name, version
        self.calls: Counter[str] = Counter()
        self.fails: str | None = None
        self.captures_work = True
        self.caches: list[bytes] = []
        self.strategies: list[str] = []

    def library(self) -> TensorRt:
        allocation = enum.Enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
        module = SimpleNamespace(
            __version__=self.version,
            ILogger=Logger,
            Logger=Logger,
            DataType=DataType,
            Runtime=functools.partial(Runtime, self),
            ExecutionContextAllocationStrategy=allocation,
            CudaGraphStrategy=enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE"),
        )
        return TensorRt(self.name, self.version, module)

    def find(self, name: Library) -> TensorRt:
        assert name == self.name
        return self.library()


DataType = enum.Enum("DataType", "HALF BF16 FLOAT INT64")


class Logger:
    """See `ILogger` and `Logger`."""

    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
    WARNING = Severity.WARNING

    def __init__(self, severity: Any = None) -> None: ...

    def log(self, severity: Any, msg: str) -> None: ...


class Runtime:
    """See `Runtime`."""

    def __init__(self, fake: FakeTensorRt, logger: Any) -> None:
        self.fake, self.logger = fake, logger

    def deserialize_cuda_engine(self, content: Any) -> Engine | None:
        try:
            plan = json.loads(bytes(content))
        except ValueError:
            self.logger.log(Logger.Severity.WARNING, "a warning")
            self.logger.log(Logger.Severity.ERROR, "Serialization assertion failed.\nmore")
            return None
        return Engine(self.fake, self.logger, plan["graph"], plan["profiles"])


class Engine:
    """See `ICudaEngine`. Its weights are in device memory until it is collected."""

    def __init__(self, fake: FakeTensorRt, logger: Any, graph: str, profiles: list[list[int]]) -> None:
        self.fake, self.logger, self.profiles = fake, logger, profiles
        self.session = session(graph)
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(profiles)
        self.weights = fake.driver.allocate(1000)

    def __del__(self) -> None:
        self.fake.driver.free(self.weights)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = {**self.inputs, **self.outputs}[name].shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_dtype(self, name: str) -> Any:
        kind = {**self.inputs, **self.outputs}[name].type
        names = {"tensor(float16)": "HALF", "tensor(float)": "FLOAT", "tensor(int64)": "INT64"}
        return DataType[names[kind]]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert name == "input_ids"
        batch, tokens = self.profiles[index]
        return [(1, 1), (batch, tokens), (batch, tokens)]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return ACTIVATIONS[index]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.fake)

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        if config is None:  # the context has activation memory of its own
            return Context(self, None, None)
        if self.fake.name == "tensorrt_rtx":
            self.fake.strategies.append(config.cuda_graph_strategy.name)
        return Context(self, config.allocation, config.cache)


class RuntimeConfig:
    """See `IRuntimeConfig`."""

    def __init__(self, fake: FakeTensorRt) -> None:
        self.fake = fake
        self.cuda_graph_strategy: Any = None
        self.allocation: Any = None
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        assert self.fake.name == "tensorrt_rtx"
        return RuntimeCache(self.fake)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy


class RuntimeCache:
    """See `IRuntimeCache`; it has one byte for each kernel that was compiled."""

    def __init__(self, fake: FakeTensorRt) -> None:
        self.fake, self.content = fake, b""

    def deserialize(self, content: bytes) -> bool:
        self.fake.caches.append(content)
        if content.startswith(b"other"):
            return False
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content


class Context:
    """See `IExecutionContext`."""

    def __init__(self, engine: Engine, allocation: Any, cache: RuntimeCache | None) -> None:
        assert allocation is None or allocation.name == "USER_MANAGED"
        self.engine, self.fake, self.cache, self.allocation = engine, engine.fake, cache, allocation
        self.profile: int | None = None
        self.memory = (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran_as: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return self._works("set_optimization_profile_async")

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.profile is not None and size >= ACTIVATIONS[self.profile]
        self.memory = (address, size)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        assert name in self.engine.inputs and self.profile is not None
        batch, tokens = self.engine.profiles[self.profile]
        declared = self.engine.inputs[name].shape
        most = {"input_ids": (batch, tokens), "starts": (batch,), "rows": (tokens,)}.get(name, (batch, *declared[1:]))
        if len(shape) != len(most) or any(not 1 <= a <= b for a, b in zip(shape, most, strict=True)):
            return False
        if name not in ("input_ids", "starts", "rows") and tuple(shape[1:]) != tuple(declared[1:]):
            return False
        self.shapes[name] = tuple(shape)
        return self._works("set_input_shape")

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names
        if address % self.fake.driver.alignment:
            raise Fault(f"{name} is not aligned")
        self.addresses[name] = address
        return self._works("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        driver, now = self.fake.driver, (dict(self.shapes), dict(self.addresses))
        assert set(self.shapes) == set(self.engine.inputs), "an input has no shape"
        assert set(self.addresses) == set(self.engine.names), "a tensor has no address"
        if not self._works("execute_async_v3"):
            return False
        is_captured = driver.is_capturing(stream)
        if is_captured:
            # Before it can be captured, a context must have run with the same shapes.
            if not self.fake.captures_work or self.ran_as != now:
                return False
            self.fake.calls["captured"] += 1
        if self.cache is not None and self.ran_as is None:
            self.cache.content += b"k"
        self.ran_as = now
        driver.put(stream, functools.partial(self._run, *now, is_captured))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], is_captured: bool) -> None:
        driver, inputs = self.fake.driver, {}
        if is_captured and (shapes, addresses) != (self.shapes, self.addresses):
            raise Fault("a graph is replayed, but its context was changed after the capture")
        if self.allocation is not None:
            driver.view("device", *self.memory).fill(0xFF)
        for name, tensor in self.engine.inputs.items():
            dtype, shape = np.dtype(_DTYPES[tensor.type]), shapes[name]
            nbytes = int(np.prod(shape)) * dtype.itemsize
            inputs[name] = driver.view("device", addresses[name], nbytes).view(dtype).reshape(shape).copy()
            if dtype.kind == "f" and not np.isfinite(inputs[name]).all():
                raise Fault(f"{name} has positions that are not finite")
        self.fake.calls["run"] += 1
        for name, value in zip(self.engine.outputs, self.engine.session.run(None, inputs), strict=True):
            past = name.replace("present", "past_key_values")
            if past != name and addresses[past] != addresses[name]:
                raise Fault(f"{name} is not in the memory of {past}")
            driver.view("device", addresses[name], value.nbytes)[:] = value.reshape(-1).view(np.uint8)

    def _works(self, method: str) -> bool:
        if self.fake.fails == method:
            self.engine.logger.log(Logger.Severity.ERROR, f"Error Code 1: {method} is broken.")
            return False
        return True
