"""Lower a cached program to an ONNX graph, op by op; inputs and outputs have the usual names of ONNX exports."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx

from ....errors import LlmcError
from ....ir.caches import Cache
from ....ir.nodes import known_value, value_of
from ....ir.program import Program, layer_of, op_name, where
from ....ir.weights import Weight, cast
from ....kernels.ops import op_of
from ....kernels.ops.quantized import FLOAT8
from ....runtimes.engines.onnx_names import DERIVED_FILE, past_name, present_name
from .external import PAGE, DataLocation, ExternalData, external_tensor
from .graph import OnnxGraph, Value, element

# A table maps op names ("llmc.rms_norm", "aten.softmax") to entries. An entry appends nodes and returns the name or
# names of the op's results. It gets the arguments by name, as in the op's own signature or schema.
Entry = Callable[..., Any]
Table = dict[str, Entry]

BATCH, LENGTH, TOTAL = "batch_size", "sequence_length", "total_sequence_length"
PAST, PRESENT, ROWS = "past_sequence_length", "present_sequence_length", "rows"
# Up to this many int64 values are stored in the graph itself, where shape inference can read them.
SMALL = 1024


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that stores a cache: uint8 for float8, which ONNX Runtime can't copy."""
    return torch.uint8 if dtype in FLOAT8.values() else dtype


@dataclass(frozen=True)
class Derived:
    """An integer matrix [I, O] that a runtime computes from 4-bit or 8-bit codes when it opens a graph.

    It holds the same numbers in the layout of another kernel. Storing it too would double the artifact.
    """

    name: str
    scheme: str
    output_channels: int
    input_channels: int
    group_size: int
    codes: DataLocation
    zeros: DataLocation | None
    multiples: DataLocation | None

    @property
    def nbytes(self) -> int:
        return self.output_channels * self.input_channels


class Lowering(OnnxGraph):
    """An ONNX graph under construction from a program.

    Attributes:
        node: the node of the program that is lowered now; its example value has the shape and dtype of the result.
        starts: the number of positions that each sequence holds before this call, [B] int64.
        held: the number of positions that each sequence holds after this call, [B] int64.
        total: the length of the attention mask, a tensor of one element.
        memo: values that many nodes share (masks, positions), by any key.
        derives: True if the runtime computes matrices in other layouts from stored codes.
        derived: those matrices, by their offset in their common file.
    """

    node: fx.Node
    starts: Value

    def __init__(self, program: Program, table: Table, data: ExternalData, derives: bool = False) -> None:
        super().__init__(data)
        self.program = program
        self.table = table
        self.derives = derives
        self.derived: dict[int, Derived] = {}
        self._derived_end = 0
        self.memo: dict[Any, Any] = {}
        self._values: dict[fx.Node, Any] = {}

    # For the entries of a table ----------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Any, count: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node, as `OnnxGraph.op`, and store the weights among its inputs unchanged."""
        for value in inputs:
            if isinstance(value, WeightValue):
                self._store(value)
        return super().op(kind, *inputs, count=count, domain=domain, **attributes)

    def derive(self, derived: Derived) -> Value:
        """Return an int8 matrix that the runtime computes."""
        shape = (derived.input_channels, derived.output_channels)
        if derived.name not in self.initializers:
            offset = -(-self._derived_end // PAGE) * PAGE
            self._derived_end = offset + derived.nbytes
            place = DataLocation(DERIVED_FILE, offset, derived.nbytes)
            self.initializers[derived.name] = external_tensor(derived.name, TensorProto.INT8, shape, place)
            self.derived[offset] = derived
        return Value(derived.name, torch.int8, shape)

    def _store(self, value: WeightValue) -> None:
        """Write a weight to the data file; small int64 weights into the graph, since shapes may depend on them."""
        if value.dtype == torch.int64 and value.weight.numel <= SMALL:
            self.initializers[value] = numpy_helper.from_array(value.weight.evaluate().numpy(), value)
        else:
            self.weight(value, value.weight)

    def size(self, size: Any) -> Value:
        """Return a size, an int or a scalar value, as a tensor of one element."""
        if isinstance(size, int):
            return self.constant([size])
        key = ("size", str(size))
        if key not in self.memo:
            self.memo[key] = Value(self.op("Reshape", size, self.constant([1])), torch.int64, (1,))
        return self.memo[key]

    def sizes(self, sizes: Sequence[Any]) -> Value:
        """Return sizes as one tensor; a constant if all sizes are constant."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes), torch.int64)
        return Value(self.op("Concat", *map(self.size, sizes), axis=0), torch.int64, (len(sizes),))

    def length(self, value: Value, dim: int) -> Value:
        """Return the size of a dimension as a tensor of one element."""
        known = value.shape[dim]
        if isinstance(known, int):
            return self.constant([known])
        dim %= len(value.shape)
        key = ("length", str(known))
        if key not in self.memo:
            self.memo[key] = Value(self.op("Shape", value, start=dim, end=dim + 1), torch.int64, (1,))
        return self.memo[key]

    def reshape(self, value: Value | str, sizes: Sequence[Any], source: Sequence[Any] = ()) -> str:
        """Reshape a value. Sizes that equal a dimension of the source, and one other, are not computed at run time.

        Args:
            sizes: sizes of the result: ints, torch's symbols, or values.
            source: shape of the source, if `value` has none.
        """
        old_sizes = [str(s) for s in (getattr(value, "shape", ()) or source)]
        target: list[Any] = []
        is_open = any(isinstance(size, int) and size == -1 for size in sizes)
        for i, size in enumerate(sizes):
            if isinstance(size, int):
                target.append(size)
            elif i < len(old_sizes) and old_sizes[i] == symbol_of(size):
                target.append(0)
            elif not is_open:
                target.append(-1)
                is_open = True
            else:
                target.append(size if isinstance(size, Value) else self._symbol(size))
        return self.op("Reshape", value, self.sizes(target))

    def positions(self) -> Value:
        """Return the positions of the new tokens, [B, S]."""
        if "positions" not in self.memo:
            steps = self.op("Range", self.constant(0), self.op("Squeeze", self._length), self.constant(1))
            starts = self.op("Unsqueeze", self.starts, self.constant([1]))
            self.memo["positions"] = Value(self.op("Add", starts, steps), torch.int64, (BATCH, LENGTH))
        return self.memo["positions"]

    def cast(self, value: Value | str, dtype: torch.dtype) -> Value:
        if getattr(value, "dtype", None) == dtype:
            return value  # type: ignore[return-value]
        return Value(self.op("Cast", value, to=element(dtype)), dtype, getattr(value, "shape", ()))

    def convert(self, value: Value, dtype: torch.dtype) -> Value:
        """Return a value in another dtype; a weight is stored in it."""
        if isinstance(value, WeightValue) and value.dtype != dtype:
            return self.weight(f"{value}.{str(dtype).removeprefix('torch.')}", cast(value.weight, dtype))
        return self.cast(value, dtype)

    # Traversal ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Lower the whole program."""
        self._make_inputs()
        for node in self.program.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                self._values[node] = WeightValue.of(name, self.program.weights[name])
            elif node.op == "call_function":
                self._lower(node)
        self._make_outputs()

    def _make_inputs(self) -> None:
        tokens, starts, wanted = self.program.tokens, self.program.starts, self.program.wanted
        self._values[tokens] = self.input("input_ids", torch.int64, [BATCH, LENGTH])
        self._values[tokens].shape = tuple(value_of(tokens).shape)
        self._length = Value(self.op("Shape", "input_ids", start=1, end=2), torch.int64, (1,))
        self.memo["length", str(value_of(tokens).shape[1])] = self._length
        self._make_starts(value_of(tokens).shape[:1])
        self._values[starts] = self.starts
        if wanted is not None:
            self._make_rows()
            self._values[wanted] = Value("rows", torch.int64, tuple(value_of(wanted).shape))
        for i, cache in enumerate(self.program.caches):
            for part in cache.tensors:
                (node,) = self.program.graph.find_nodes(op="placeholder", target=part.name)
                shape: list[int | str] = [BATCH, cache.heads, self._cache_length(cache, PAST), part.width]
                value = self.input(past_name(i, part.role), stored_as(part.dtype), shape)
                self._values[node] = Value(value, part.dtype, value_of(node).shape)

    def _make_starts(self, shape: Sequence[Any]) -> None:
        """Set `starts`, and what else follows from the mask of positions that count after the call."""
        mask = self.input("attention_mask", torch.int64, [BATCH, TOTAL])
        self.held = Value(self.op("ReduceSum", mask, self.constant([1]), keepdims=0), torch.int64, shape)
        self.total = Value(self.op("Shape", "attention_mask", start=1, end=2), torch.int64, (1,))
        self.starts = Value(self.op("Sub", self.held, self._length), torch.int64, shape)

    def _make_rows(self) -> None:
        self.input("rows", torch.int64, [ROWS])
        # The default returns the logits of the last token, for callers that do not set this input.
        self.initializers["rows"] = numpy_helper.from_array(np.array([-1]), "rows")

    def _cache_length(self, cache: Cache, name: str) -> int | str:
        """Return the declared length of a cache: a number, or a name for any."""
        return cache.length if cache.ring else name

    def _make_outputs(self) -> None:
        (end,) = self.program.graph.find_nodes(op="output")
        logits, *caches = end.args[0]
        logits_in_float = self.cast(self._values[logits], torch.float32)
        self.output(logits_in_float, "logits", torch.float32, [BATCH, self._rows(), value_of(logits).shape[2]])
        parts = ((i, cache, part) for i, cache in enumerate(self.program.caches) for part in cache.tensors)
        for node, (i, cache, part) in zip(caches, parts, strict=True):
            shape: list[int | str] = [BATCH, cache.heads, self._cache_length(cache, PRESENT), part.width]
            self.output(self._values[node], present_name(i, part.role), stored_as(part.dtype), shape)

    def _rows(self) -> int | str:
        """Return the declared number of tokens of a sequence whose logits the graph returns."""
        # The declared length is 1, as by the default of "rows": by it, onnxruntime-genai knows that the graph returns
        # the logits of the last token only.
        return 1 if "rows" in self.initializers else LENGTH

    def _lower(self, node: fx.Node) -> None:
        self.node, self.scope = node, where(node) or layer_of(node)
        arguments: Any = fx.map_arg((node.args, dict(node.kwargs)), self._values.__getitem__)
        args, kwargs = arguments
        if node.target is operator.getitem:
            self._values[node] = args[0][args[1]]
            return
        name = op_name(node)
        if name == "aten.sym_size":
            self._values[node] = self._symbol(value_of(node))
            return
        entry = self.table.get(name)
        if entry is None:
            raise LlmcError(
                "OP_UNSUPPORTED",
                f"The ONNX targets have no lowering for {name}, which {where(node) or 'the model'} calls.",
                "This model can't be compiled for ONNX. Report it.",
            )
        self._values[node] = self._typed(entry(self, **self._named_arguments(node, args, kwargs)), value_of(node))

    def _named_arguments(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        if defined := op_of(node.target):
            return defined.bind(tuple(args), kwargs)
        if not isinstance(node.target, torch._ops.OpOverload):
            return dict(zip("abc", args, strict=False))
        named = {}
        for i, parameter in enumerate(node.target._schema.arguments):
            argument = args[i] if i < len(args) else kwargs.get(parameter.name, parameter.default_value)
            named["input" if parameter.name == "self" else parameter.name] = argument
        return named

    def _symbol(self, size: Any) -> Value:
        """Return a scalar for a symbolic size of the program, such as the batch size."""
        if isinstance(size, int):
            return self.constant(size)
        key = ("scalar", str(size))
        if key not in self.memo:
            length = self.memo.get(("length", str(size)))
            if length is None:
                length = self._length_of(size)
            self.memo[key] = Value(self.op("Squeeze", length), torch.int64, (), symbol=str(size))
        return self.memo[key]

    def _length_of(self, size: Any) -> Value:
        for node, value in self._values.items():
            example = known_value(node)
            if isinstance(example, Tensor) and isinstance(value, Value):
                for dim, known in enumerate(example.shape):
                    if str(known) == str(size):
                        return self.length(value, dim)
        raise AssertionError(f"no value has a size {size}")

    def _typed(self, result: Any, example: Any) -> Any:
        """Return the names that an entry returned, with dtypes and shapes of the program's example values."""
        if isinstance(result, (tuple, list)):
            return tuple(self._typed(one, of_one) for one, of_one in zip(result, example, strict=True))
        if isinstance(example, Tensor):
            return Value(result, example.dtype, example.shape)
        return Value(result, getattr(result, "dtype", torch.int64), symbol=str(example))


def symbol_of(size: Any) -> str:
    """Return a text that is equal for equal sizes: a number or the symbol."""
    return size.symbol if isinstance(size, Value) else str(size)


class WeightValue(Value):
    """A weight that is not stored yet. An entry may store it in another form; otherwise it is stored unchanged."""

    weight: Weight

    @classmethod
    def of(cls, name: str, weight: Weight) -> WeightValue:
        self = cls(name, weight.dtype, weight.shape)
        self.weight = weight
        return self
