"""An ONNX graph under construction: nodes, constants, and weights in a data file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from ....errors import LlmcError
from ....ir.weights import Weight
from .external import ExternalData, external_tensor

if TYPE_CHECKING:
    from typing_extensions import Self

MICROSOFT = "com.microsoft"
# Versions that ONNX Runtime 1.30 and TensorRT support. Newer features are not used.
IR_VERSION = 11
OPSET = 24
# Written into every graph. Increased only when the lowering changes, so that releases with the same lowering write the
# same bytes.
LOWERING_VERSION = "0.2.0"

ELEMENT = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.uint32: TensorProto.UINT32,
    torch.bool: TensorProto.BOOL,
}


def element(dtype: torch.dtype) -> int:
    """Return the number of a dtype's ONNX element type."""
    if dtype not in ELEMENT:
        raise LlmcError("ONNX_DTYPE", f"ONNX has no element type for {dtype}.", "Compile with --dtype fp32.")
    return ELEMENT[dtype]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array, also one of bfloat16, which torch can't convert."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Value(str):
    """The name of an ONNX value, with its dtype and shape in the program.

    Attributes:
        symbol: the symbol of the size in the program, if the value is a size; else empty.
    """

    dtype: torch.dtype
    shape: tuple[Any, ...]
    symbol: str

    def __new__(cls, name: str, dtype: torch.dtype = torch.int64, shape: Sequence[Any] = (), symbol: str = "") -> Self:
        self = super().__new__(cls, name)
        self.dtype, self.shape, self.symbol = dtype, tuple(shape), symbol
        return self


class OnnxGraph:
    """A graph whose names depend only on the order of the calls, so equal programs give equal bytes."""

    def __init__(self, data: ExternalData) -> None:
        self.data = data
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.domains = {""}
        self.scope = ""
        self._taken: dict[str, int] = {}
        self._constants: dict[tuple[Any, ...], str] = {}

    def op(self, kind: str, *inputs: Any, count: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node and return the name of its output, or a tuple of `count` names.

        Args:
            inputs: names of values; None omits an input.
            attributes: those that are None are omitted.
        """
        outputs = [self._name(kind if count == 1 else f"{kind}_{i}") for i in range(count)]
        names = ["" if x is None else str(x) for x in inputs]
        while names and not names[-1]:
            names.pop()
        attributes = {k: v for k, v in sorted(attributes.items()) if v is not None}
        self.nodes.append(helper.make_node(kind, names, outputs, name=outputs[0], domain=domain, **attributes))
        self.domains.add(domain)
        return outputs[0] if count == 1 else tuple(outputs)

    @contextmanager
    def subgraph(self) -> Iterator[list[onnx.NodeProto]]:
        """Append nodes to a list of their own, the nodes of a subgraph; they may read values of the outer graph."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def if_else(
        self,
        condition: str,
        then: Callable[[], Sequence[str]],
        otherwise: Callable[[], Sequence[str]],
        dtypes: Sequence[torch.dtype],
    ) -> tuple[str, ...]:
        """Append an If; each branch has the nodes that one of the functions appends.

        Args:
            dtypes: those of the results of either function.
        """
        branches = {"then_branch": self._branch(then, dtypes), "else_branch": self._branch(otherwise, dtypes)}
        return self.op("If", condition, count=len(dtypes), **branches)

    def _branch(self, make: Callable[[], Sequence[str]], dtypes: Sequence[torch.dtype]) -> onnx.GraphProto:
        with self.subgraph() as nodes:
            names = make()
        outputs = [helper.make_tensor_value_info(n, element(d), None) for n, d in zip(names, dtypes, strict=True)]
        return helper.make_graph(nodes, "branch", [], outputs)

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> Value:
        """Return a small value that the graph itself stores; equal values share it."""
        tensor = torch.as_tensor(value, dtype=dtype)
        array = to_numpy(tensor)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self._name("const", scoped=False)
            self.initializers[name] = onnx.numpy_helper.from_array(np.asarray(array), name)
        return Value(self._constants[key], tensor.dtype, tensor.shape)

    def weight(self, name: str, weight: Weight, dtype: int | None = None, shape: Sequence[int] | None = None) -> Value:
        """Return a weight that the data file stores.

        Args:
            dtype: the ONNX element type of the bytes; None: that of the weight's dtype.
            shape: the ONNX shape; None: the weight's.
        """
        if name not in self.initializers:
            location = self.data.add(name, weight)
            kind = dtype or element(weight.dtype)
            self.initializers[name] = external_tensor(name, kind, shape or weight.shape, location)
        return Value(name, weight.dtype, shape or weight.shape)

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> Value:
        self.inputs.append(helper.make_tensor_value_info(name, element(dtype), list(shape)))
        self._taken[name] = 1
        return Value(name, dtype, shape)

    def output(self, value: str, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph, called `name`."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, element(dtype), list(shape)))

    def model(self) -> onnx.ModelProto:
        """Return the finished model, whose weights refer to the data file."""
        self._rename_outputs()
        graph = helper.make_graph(self.nodes, "llmc", self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid(domain, 1 if domain else OPSET) for domain in sorted(self.domains)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="llmc", producer_version=LOWERING_VERSION
        )

    def save(self, path: Path) -> None:
        path.write_bytes(self.model().SerializeToString(deterministic=True))

    def _rename_outputs(self) -> None:
        """Name values as their outputs and remove the Identity nodes, which may copy."""
        names = {output.name for output in self.outputs}
        producers = {name: (node, i) for node in self.nodes for i, name in enumerate(node.output) if name not in names}
        for identity in [node for node in self.nodes if node.op_type == "Identity" and node.output[0] in names]:
            if identity.input[0] not in producers:
                continue  # an input, a weight, or a value that was renamed to another output
            inner, outer = identity.input[0], identity.output[0]
            producer, index = producers[inner]
            self.nodes.remove(identity)
            producer.output[index] = outer
            _rename_inputs(self.nodes, inner, outer)

    def _name(self, base: str, scoped: bool = True) -> str:
        base = f"{self.scope}/{base}" if scoped and self.scope else base
        count = self._taken[base] = self._taken.get(base, 0) + 1
        return base if count == 1 else f"{base}_{count}"


def _rename_inputs(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Rename a value where nodes and their subgraphs read it."""
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_inputs(attribute.g.node, old, new)
