"""Parse the neutral ONNX graph into a TensorRT network, and find multiplications and attentions in it."""

from __future__ import annotations

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
    "DEQUANTIZE": "IDequantizeLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "GATHER": "IGatherLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "SHUFFLE": "IShuffleLayer",
}
_DTYPES = {"FLOAT": "fp32", "HALF": "fp16"}
# Layers that change the shape of a tensor only, or the order of its axes.
RESHAPES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")


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

    def users(self, tensor: Any) -> list[tuple[Any, int]]:
        """Return the layers that read a tensor, each with the index of its input."""
        return [
            (layer, index)
            for layer in self.layers
            for index in range(layer.num_inputs)
            if (read := layer.get_input(index)) is not None and read.name == tensor.name
        ]

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


def find_matmuls(network: Network) -> list[MatMul]:
    """Return the multiplications with constant weights."""
    makers = makers_of(network)
    found = []
    for layer in network.layers:
        if layer.type.name != "MATRIX_MULTIPLY":
            continue
        stored = skip_reshapes(layer.get_input(1), makers)
        if stored is not None and stored.type.name == "DEQUANTIZE":
            stored = skip_reshapes(stored.get_input(0), makers)
        if stored is None or stored.type.name != "CONSTANT":
            continue
        sizes = list(layer.get_input(1).shape)[-2:]
        transposed = layer.op1 == network.library.module.MatrixOperation.TRANSPOSE
        outputs, inputs = sizes if transposed else sizes[::-1]
        weight = _dtype(stored.get_output(0))
        quantized = skip_reshapes(layer.get_input(0), makers)
        if quantized is not None and quantized.type.name == "DEQUANTIZE":
            source = quantized.get_input(0)
        else:
            source = layer.get_input(0)
        found.append(MatMul(node_of(layer), weight, _dtype(source), inputs, outputs))
    return found


def find_attentions(network: Network) -> list[Attention]:
    """Return the attentions."""
    makers = makers_of(network)
    outputs = [layer for layer in network.layers if layer.type.name == "ATTENTION_OUTPUT"]
    return [Attention(node_of(output), makers[output.get_input(0).name]) for output in outputs]


def node_of(layer: Any) -> str:
    """Return the name of the ONNX node that a layer was made from."""
    marked = str(layer.metadata)
    start = "[ONNX Layer: "
    return marked[len(start) : -1] if marked.startswith(start) and marked.endswith("]") else str(layer.name)


def makers_of(network: Network) -> dict[str, Any]:
    """Return the layer that makes each tensor."""
    return {layer.get_output(index).name: layer for layer in network.layers for index in range(layer.num_outputs)}


def skip_reshapes(tensor: Any, makers: dict[str, Any]) -> Any | None:
    """Return the layer that makes a tensor, apart from reshapes and transposes; None for an input of the network."""
    layer = makers.get(tensor.name)
    while layer is not None and layer.type.name in RESHAPES:
        layer = makers.get(layer.get_input(0).name)
    return layer


def _dtype(tensor: Any) -> str:
    name = tensor.dtype.name
    return _DTYPES.get(name, name.lower())


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
