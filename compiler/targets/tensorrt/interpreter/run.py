"""Evaluate a network on the CPU, layer by layer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from .call import Call
from .dtypes import numpy_dtype, round_to
from .table import KINDS

_NONE: Mapping[str, np.ndarray] = MappingProxyType({})


def run(
    network: Any,
    feeds: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray] = _NONE,
    keep: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Return the values of a network's outputs.

    Layers compute in float32, and each result is rounded to its tensor's dtype. Its shape must be the one that
    TensorRT inferred.

    Args:
        network: an `INetworkDefinition` of either library.
        feeds: the values of all inputs.
        constants: the values of constants that TensorRT does not return as arrays (bf16, fp8, int4), by the name of
            the layer, which is that of the ONNX initializer, or of its output. See `collect_constants`.
        keep: the names of other tensors to return.

    Raises:
        NotImplementedError: a layer is not covered; the message names it.
        ValueError: a layer can't be evaluated, or its result is not what TensorRT inferred.
    """
    layers = [_Layer(network, i) for i in range(network.num_layers)]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    values = _checked_feeds(network, feeds)
    kept = {*outputs, *keep}
    needed = _needed(_in_order(layers, values), kept)
    readers = Counter(name for layer in needed for name in layer.reads if name is not None)
    with np.errstate(all="ignore"):
        for layer in needed:
            values.update(layer.evaluate(values, constants))
            readers.subtract(name for name in layer.reads if name is not None)
            for name in {*layer.reads, *layer.writes} - kept:
                if name is not None and readers[name] == 0:
                    values.pop(name, None)
    # A copy: constants and views of them lie in the network's memory.
    return {name: values[name].copy() for name in [*outputs, *keep]}


class _Layer:
    """A layer and the names of the tensors that it reads and writes."""

    def __init__(self, network: Any, index: int) -> None:
        self._library = sys.modules[type(network).__module__]
        self._layer = network.get_layer(index)
        # Some interfaces have a `type` of their own.
        self._type: str = self._library.ILayer.type.__get__(self._layer).name
        self.name = f"{self._type} {self._layer.name}"
        if self._type not in KINDS:
            raise NotImplementedError(f"The interpreter does not cover the layer {self.name}.")
        self._tensors = [self._layer.get_output(i) for i in range(self._layer.num_outputs)]
        self.reads = [None if tensor is None else str(tensor.name) for tensor in self._sources()]
        self.writes = [str(tensor.name) for tensor in self._tensors]

    def evaluate(self, values: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the values of the outputs, rounded and checked."""
        interface, function = KINDS[self._type]
        inputs = [None if name is None else values[name] for name in self.reads]
        before = self._layer.__class__
        self._layer.__class__ = getattr(self._library, interface)
        try:
            results = function(Call(self._layer, self.name, inputs, self._tensors, constants))
            results = results if isinstance(results, tuple) else (results,)
            return {
                str(tensor.name): _checked(tensor, np.asarray(result))
                for tensor, result in zip(self._tensors, results, strict=True)
            }
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{self.name} can't be evaluated: {error.args[0] if error.args else error}.") from error
        finally:
            self._layer.__class__ = before

    def _sources(self) -> list[Any]:
        """Return the tensors that the layer reads; the end of an attention reads those that its begin got."""
        layer = self._layer
        if self._type != "ATTENTION_OUTPUT":
            return [layer.get_input(i) for i in range(layer.num_inputs)]
        before, layer.__class__ = layer.__class__, self._library.IAttentionOutputLayer
        attention = layer.attention
        layer.__class__ = before
        return [*(attention.get_input(i) for i in range(3)), attention.mask]


def _in_order(layers: list[_Layer], feeds: Mapping[str, np.ndarray]) -> list[_Layer]:
    """Sort layers, so that each comes after those whose results it reads.

    Otherwise the order remains, so that a dequantized weight is not kept in memory for long. Only loops have cycles,
    and their layers are not covered.
    """
    writers: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for name in layer.writes:
            if name in writers or name in feeds:
                raise ValueError(f"Two tensors are called {name}.")
            writers[name] = index
    for layer in layers:
        missing = {name for name in layer.reads if name is not None} - writers.keys() - feeds.keys()
        if missing:
            raise ValueError(f"{layer.name} reads {', '.join(sorted(missing))}, which nothing writes.")
    before = {index: [writers[name] for name in layer.reads if name in writers] for index, layer in enumerate(layers)}
    done: dict[int, None] = {}
    for last in range(len(layers)):
        stack = [last]
        while stack:
            waiting = [index for index in before[stack[-1]] if index not in done]
            if not waiting:
                done[stack.pop()] = None
            stack.extend(waiting)
    return [layers[index] for index in done]


def _needed(layers: list[_Layer], names: Collection[str]) -> list[_Layer]:
    """Return the layers that tensors depend on, and those without results. A rewritten network has others as well."""
    wanted, needed = set(names), []
    for layer in reversed(layers):
        if not layer.writes or not wanted.isdisjoint(layer.writes):
            needed.append(layer)
            wanted.update(name for name in layer.reads if name is not None)
    return needed[::-1]


def _checked_feeds(network: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    if tensors.keys() != feeds.keys():
        raise ValueError(f"The network's inputs are {sorted(tensors)}, but the feeds are {sorted(feeds)}.")
    for name, tensor in tensors.items():
        if feeds[name].dtype != numpy_dtype(tensor):
            raise ValueError(f"Input {name} is {feeds[name].dtype}, but the network takes {tensor.dtype.name}.")
    return {name: _checked(tensor, feeds[name]) for name, tensor in tensors.items()}


def _checked(tensor: Any, value: np.ndarray) -> np.ndarray:
    """Return a value rounded to the dtype of a tensor, if it has the tensor's shape."""
    inferred = tuple(tensor.shape)
    if len(inferred) != value.ndim or any(n not in (-1, got) for n, got in zip(inferred, value.shape, strict=True)):
        raise ValueError(f"{tensor.name} is {value.shape}, but TensorRT inferred {inferred}")
    return round_to(value, numpy_dtype(tensor))
