"""Parse the neutral ONNX graph into a TensorRT network, and rewrite it so that TensorRT builds a small, fast engine.

1. MatMul(x, Transpose(w)) becomes MatMul(x, w, TRANSPOSE): the profiles of a plan share weights [outputs, inputs] only.
2. Attention multiplies its queries with the whole scale. The parser multiplies queries and keys with the root of it,
   and the keys are the whole cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import LlmcError
from ....runtimes.engines.tensorrt.library import TensorRt

# TensorRT's bindings return every layer as an ILayer; the class that has a layer's own attributes is assigned.
_CLASSES = {
    "ATTENTION_INPUT": "IAttentionInputLayer",
    "CONSTANT": "IConstantLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "SHUFFLE": "IShuffleLayer",
}
_DTYPES = {"FLOAT": "fp32", "HALF": "fp16"}
_RESHAPES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")


@dataclass(frozen=True)
class MatMul:
    """A multiplication with a constant weight.

    Attributes:
        node: its name in the graph.
        weight: the dtype of the stored weight, such as "int4".
        input: the dtype of the input: "int8" or "fp8" if it is quantized.
        inputs: input channels.
        outputs: output channels.
    """

    node: str
    weight: str
    input: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Attention:
    """An attention.

    Attributes:
        node: its name in the graph.
        layer: TensorRT's first layer of it, whose inputs are queries, keys, values and mask.
    """

    node: str
    layer: Any


@dataclass
class Network:
    """A parsed network, and what must live as long as it does."""

    library: TensorRt
    builder: Any
    definition: Any
    parser: Any
    constants: list[np.ndarray] = field(default_factory=list)

    @property
    def layers(self) -> list[Any]:
        """All layers, each with the class of its kind, in the order of the parser."""
        module, definition = self.library.module, self.definition
        layers = [definition.get_layer(index) for index in range(definition.num_layers)]
        for layer in layers:
            if name := _CLASSES.get(layer.type.name):
                layer.__class__ = getattr(module, name)
        return layers

    def scalar(self, value: float, rank: int, dtype: Any) -> Any:
        """Add a constant of so many dimensions of size 1."""
        array = np.full((1,) * rank, value, np.float32)
        self.constants.append(array)
        constant = self.add("constant", array.shape, self.library.module.Weights(array))
        return self.add("cast", constant.get_output(0), dtype).get_output(0)

    def add(self, kind: str, *arguments: Any) -> Any:
        """Add a layer of a kind, such as "shuffle"."""
        return checked(getattr(self.definition, f"add_{kind}")(*arguments), kind)


def checked(layer: Any, kind: str) -> Any:
    """Return a new layer. TensorRT returns None instead of raising an exception.

    Raises:
        LlmcError: TRT_BUILD_FAILED.
    """
    if layer is None:
        raise LlmcError(
            "TRT_BUILD_FAILED",
            f"TensorRT refused a layer of kind {kind} that llmc adds to the network.",
            "Report this as a defect, with the model and the command.",
        )
    return layer


def parse(library: TensorRt, logger: Any, path: Path) -> Network:
    """Parse an ONNX file, which may keep weights in another file beside it.

    Args:
        logger: a logger of the library.

    Raises:
        LlmcError: TRT_PARSE_REFUSED, naming the op and the node.
    """
    builder = library.module.Builder(logger)
    definition = builder.create_network(0)
    parser = library.module.OnnxParser(definition, logger)
    if not parser.parse_from_file(str(path)):
        raise _refusal(library, parser, path)
    return Network(library, builder, definition, parser)


def polish(network: Network) -> None:
    """Rewrite a parsed network in place; see the top of this module."""
    sources = _sources(network)
    for layer in network.layers:
        if layer.type.name == "MATRIX_MULTIPLY":
            _transpose_in_matmul(network, layer, sources)
        elif layer.type.name == "ATTENTION_INPUT":
            _scale_queries(network, layer, sources)


def find_matmuls(network: Network) -> list[MatMul]:
    """Return the multiplications with constant weights."""
    sources = _sources(network)
    found = []
    for layer in network.layers:
        if layer.type.name != "MATRIX_MULTIPLY":
            continue
        stored = _skip_reshapes(layer.get_input(1), sources)
        if stored is not None and stored.type.name == "DEQUANTIZE":
            stored = _skip_reshapes(stored.get_input(0), sources)
        if stored is None or stored.type.name != "CONSTANT":
            continue
        sizes = list(layer.get_input(1).shape)[-2:]
        transposed = layer.op1 == network.library.module.MatrixOperation.TRANSPOSE
        outputs, inputs = sizes if transposed else sizes[::-1]
        weight = _dtype(stored.get_output(0))
        quantized = _skip_reshapes(layer.get_input(0), sources)
        if quantized is not None and quantized.type.name == "DEQUANTIZE":
            source = quantized.get_input(0)
        else:
            source = layer.get_input(0)
        found.append(MatMul(node_of(layer), weight, _dtype(source), inputs, outputs))
    return found


def find_attentions(network: Network) -> list[Attention]:
    """Return the attentions."""
    sources = _sources(network)
    outputs = [layer for layer in network.layers if layer.type.name == "ATTENTION_OUTPUT"]
    return [Attention(node_of(output), sources[output.get_input(0).name]) for output in outputs]


def node_of(layer: Any) -> str:
    """Return the name of the ONNX node that a layer was made from."""
    marked = str(layer.metadata)
    start = "[ONNX Layer: "
    return marked[len(start) : -1] if marked.startswith(start) and marked.endswith("]") else str(layer.name)


def _sources(network: Network) -> dict[str, Any]:
    """Return the layer that makes each tensor."""
    return {layer.get_output(index).name: layer for layer in network.layers for index in range(layer.num_outputs)}


def _skip_reshapes(tensor: Any, sources: dict[str, Any]) -> Any | None:
    """Return the layer that makes a tensor, apart from reshapes and transposes; None for an input of the network."""
    layer = sources.get(tensor.name)
    while layer is not None and layer.type.name in _RESHAPES:
        layer = sources.get(layer.get_input(0).name)
    return layer


def _dtype(tensor: Any) -> str:
    name = tensor.dtype.name
    return _DTYPES.get(name, name.lower())


def _transpose_in_matmul(network: Network, matmul: Any, sources: dict[str, Any]) -> None:
    operation = network.library.module.MatrixOperation
    weight = matmul.get_input(1)
    chain = list(_reshapes_before(weight, sources))
    source = chain[-1].get_input(0) if chain else weight
    maker = sources.get(source.name)
    if maker is None or maker.type.name not in ("CONSTANT", "DEQUANTIZE") or matmul.op1 != operation.NONE:
        return
    axes = _axes_after(chain, source)
    shape = list(weight.shape)
    last = len(source.shape) - 1
    if axes is None or axes[-2:] != [last, last - 1] or axes[:-2] != sorted(axes[:-2]):
        return
    reshape = network.add("shuffle", source)
    reshape.reshape_dims = (*shape[:-2], shape[-1], shape[-2])
    reshape.name = f"{matmul.name}.weight"
    matmul.set_input(1, reshape.get_output(0))
    matmul.op1 = operation.TRANSPOSE


def _reshapes_before(tensor: Any, sources: dict[str, Any]) -> Iterator[Any]:
    """Yield the reshapes and transposes that make a tensor, the last one first."""
    layer = sources.get(tensor.name)
    while layer is not None and layer.type.name in _RESHAPES:
        yield layer
        layer = sources.get(layer.get_input(0).name)


def _axes_after(chain: list[Any], source: Any) -> list[int] | None:
    """Return the axes of `source` in their order after a chain of layers, without axes of size 1.

    None if the chain splits or joins axes.
    """
    axes = [(axis, size) for axis, size in enumerate(source.shape)]
    for layer in reversed(chain):
        before, after = len(axes), list(layer.get_output(0).shape)
        if min([*after, 0]) < 0:
            return None
        second = list(range(len(after)))
        if layer.type.name == "SHUFFLE":
            axes = [axes[axis] for axis in list(layer.first_transpose)[:before]]
            second = list(layer.second_transpose)[: len(after)]
        reshaped = [0] * len(after)
        for place, axis in enumerate(second):
            reshaped[axis] = after[place]
        kept = [one for one in axes if one[1] != 1]
        if [size for _, size in kept] != [size for size in reshaped if size != 1]:
            return None
        left = iter(kept)
        axes = [next(left) if size != 1 else (-1, 1) for size in reshaped]
        axes = [axes[axis] for axis in second]
    return [axis for axis, size in axes if size != 1]


def _scale_queries(network: Network, layer: Any, sources: dict[str, Any]) -> None:
    queries, query_factor = _without_factor(network, layer.get_input(0), sources)
    keys, key_factor = _without_factor(network, layer.get_input(1), sources)
    if key_factor is None:
        return
    layer.set_input(1, keys)
    factor = key_factor * (1.0 if query_factor is None else query_factor)
    if abs(factor - 1) < 1e-6:
        layer.set_input(0, queries)
        return
    product = network.library.module.ElementWiseOperation.PROD
    scale = network.scalar(factor, len(queries.shape), queries.dtype)
    layer.set_input(0, network.add("elementwise", queries, scale, product).get_output(0))


def _without_factor(network: Network, tensor: Any, sources: dict[str, Any]) -> tuple[Any, float | None]:
    """Return x and the number c if a tensor is x * c, else the tensor and None."""
    layer = sources.get(tensor.name)
    if layer is None or layer.type.name != "ELEMENTWISE":
        return tensor, None
    if layer.op != network.library.module.ElementWiseOperation.PROD:
        return tensor, None
    constant = sources.get(layer.get_input(1).name)
    while constant is not None and constant.type.name in ("CAST", *_RESHAPES):
        constant = sources.get(constant.get_input(0).name)
    if constant is None or constant.type.name != "CONSTANT" or constant.get_output(0).dtype.name != "FLOAT":
        return tensor, None
    values = np.asarray(constant.weights)
    return (layer.get_input(0), float(values.ravel()[0])) if values.size == 1 else (tensor, None)


def _refusal(library: TensorRt, parser: Any, path: Path) -> LlmcError:
    if not parser.num_errors:
        return LlmcError(
            "TRT_PARSE_REFUSED", f"TensorRT can't read {path.name}.", "Compile the model again: the file is damaged."
        )
    error = parser.get_error(0)
    op, node = error.node_operator(), error.node_name()
    place = f"op {op or 'of unknown kind'}, node {node!r}"
    reason = " ".join(str(error.desc()).split())[:300].rstrip(".")
    return LlmcError(
        "TRT_PARSE_REFUSED",
        f"TensorRT {library.version} refuses the graph at {place}: {reason}.",
        "Compile the model for another target, or with another scheme.",
    )
