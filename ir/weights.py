"""Weight expressions: lazy tensors, read from disk and computed on demand.

The shape and dtype of a `Weight` are known without reading data. `evaluate()` reads its sources and computes one
tensor. It caches at most the other results of the last call with several results, so memory is bounded by the
largest tensor and not by the model. For example, a pass that merges three projections creates the expression
`concat([q, k, v], 0)` and computes nothing.

Expressions are ATen calls whose arguments are weights. Create them with the functions below, or record them from
ordinary torch code with `record`; this is how the checkpoint conversions of transformers become expressions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import LlmcError
from .result_types import TensorType, result_types

aten = torch.ops.aten


class WeightSource(Protocol):
    """The storage of a leaf's data: a part of a file, or memory."""

    @property
    def key(self) -> str: ...  # sources with equal keys hold equal values
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> Tensor: ...


class Weight:
    """A tensor that is computed on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self) -> Tensor:
        """Compute the value and return it as a contiguous tensor."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        """Yield the leaves that the value depends on, in order, once for each use."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """An identifier of the value: weights with equal keys have equal values."""
        raise NotImplementedError

    @property
    def is_constant(self) -> bool:
        """True if the value depends on the architecture only, not on training."""
        return all(leaf.constant for leaf in self.leaves())

    @property
    def nbytes(self) -> int:
        """The size of the value in bytes, not that of its sources."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def meta(self) -> Tensor:
        """Return a tensor on the meta device with this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, eq=False)
class Leaf(Weight):
    """A tensor of a source, unchanged.

    Attributes:
        constant: the value depends on the architecture and not on training, such as a table of frequencies or a
            mask. Passes may read it and compute with it.
    """

    source: WeightSource
    constant: bool = False

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    @property
    def key(self) -> str:
        return self.source.key

    def evaluate(self) -> Tensor:
        return self.source.read().contiguous()

    def leaves(self) -> Iterator[Leaf]:
        yield self

    def __repr__(self) -> str:
        return str(self.source)


@dataclass(frozen=True, eq=False)
class Call(Weight):
    """An ATen call on weights and plain values; `output` selects a result."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int | None = None

    def __post_init__(self) -> None:
        args, kwargs = pytree.tree_map(
            lambda x: TensorType(tuple(x.shape), x.dtype) if isinstance(x, Weight) else x, (self.args, self.kwargs)
        )
        result = result_types(self.target, args, kwargs)[self.output or 0]
        object.__setattr__(self, "shape", result.shape)
        object.__setattr__(self, "dtype", result.dtype)

    @property
    def key(self) -> str:
        arguments, structure = pytree.tree_flatten((self.args, self.kwargs))
        parts = [x.key if isinstance(x, Weight) else repr(x) for x in arguments]
        return hashlib.sha256(repr((str(self.target), self.output, parts, str(structure))).encode()).hexdigest()

    def evaluate(self) -> Tensor:
        if self.target in (aten.cat.default, aten.stack.default):
            return self._join()
        # Views were recorded on contiguous tensors, and some of them fail on transposed ones.
        if self.output is None:
            result: Tensor = self.run_whole()
            return result.contiguous()
        return _results_of(self)[self.output].contiguous()

    def leaves(self) -> Iterator[Leaf]:
        for argument in self._flat_arguments():
            if isinstance(argument, Weight):
                yield from argument.leaves()

    def __repr__(self) -> str:
        name = self.target._schema.name.removeprefix("aten::")
        shown = ", ".join(repr(x) for x in [*self.args, *(f"{k}={v!r}" for k, v in self.kwargs.items())])
        return f"{name}({shown})" + ("" if self.output is None else f"[{self.output}]")

    def _flat_arguments(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def run_whole(self) -> Any:
        """Return all results of the call, regardless of `output`."""
        args, kwargs = pytree.tree_map(lambda x: x.evaluate() if isinstance(x, Weight) else x, (self.args, self.kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        with torch.no_grad():
            return self.target(*args, **kwargs)

    def _join(self) -> Tensor:
        """Copy the parts into the result, with only one of them in memory at a time."""
        parts: Sequence[Weight] = self.args[0]
        dim = self.args[1] if len(self.args) > 1 else self.kwargs.get("dim", 0)
        result = torch.empty(self.shape, dtype=self.dtype)
        start = 0
        for index, part in enumerate(parts):
            if self.target is aten.stack.default:
                result.select(dim, index).copy_(part.evaluate())
            else:
                result.narrow(dim, start, part.shape[dim]).copy_(part.evaluate())
                start += part.shape[dim]
        return result


# The results of the last evaluated call that has several, by its key for output 0. The codes and the scales of a
# quantized weight are evaluated one after the other, and quantization is slow. One entry keeps memory bounded. The
# entry includes the call to keep its tensors alive: the key of a tensor in memory is its address, which Python reuses.
_recent: dict[str, tuple[Call, Any]] = {}


def _results_of(call: Call) -> Any:
    key = replace(call, output=0).key
    if key not in _recent:
        _recent.clear()  # free the old results before computing the new ones
        results = call.run_whole()
        _recent.clear()  # evaluating the arguments may have added an entry
        _recent[key] = call, results
    return _recent[key][1]


def concat(parts: Sequence[Weight], dim: int) -> Weight:
    """Concatenate the parts along `dim`."""
    return parts[0] if len(parts) == 1 else Call(aten.cat.default, (list(parts), dim))


def transpose(weight: Weight, dim0: int = 0, dim1: int = 1) -> Weight:
    """Swap two dimensions; the value is contiguous."""
    return Call(
        aten.clone.default,
        (Call(aten.transpose.int, (weight, dim0, dim1)),),
        {"memory_format": torch.contiguous_format},
    )


def slice_dim0(weight: Weight, start: int, end: int) -> Weight:
    """Slice the first dimension, such as the output channels."""
    return Call(aten.slice.Tensor, (weight, 0, start, end))


def dim0_slice_of(weight: Weight) -> tuple[Weight, int] | None:
    """Return `(whole, start)` if the weight is a slice made by `slice_dim0`, else None."""
    if (
        isinstance(weight, Call)
        and weight.target is aten.slice.Tensor
        and weight.args[1] == 0
        and len(weight.args) == 4
        and isinstance(weight.args[2], int)
        and weight.args[2] >= 0  # negative starts count from the end
    ):
        return weight.args[0], weight.args[2]
    return None


def cast(weight: Weight, dtype: torch.dtype) -> Weight:
    """Convert to another dtype; returns the weight itself if it has that dtype."""
    return weight if weight.dtype == dtype else Call(aten._to_copy.default, (weight,), {"dtype": dtype})


def widened(weight: Weight) -> Weight:
    """Return the same expression without its conversions to half precision, so that nothing is rounded on the way."""
    if not isinstance(weight, Call):
        return weight
    if weight.target is aten._to_copy.default and weight.dtype in (torch.float16, torch.bfloat16):
        source = widened(weight.args[0])
        return source if source.dtype.is_floating_point else weight
    args, kwargs = pytree.tree_map(lambda x: widened(x) if isinstance(x, Weight) else x, (weight.args, weight.kwargs))
    return Call(weight.target, args, kwargs, weight.output)


def fold(weight: Weight, factor: Weight | float) -> Weight:
    """Multiply the weight by a number or by a broadcastable weight."""
    overload = aten.mul.Tensor if isinstance(factor, Weight) else aten.mul.Scalar
    return Call(overload, (weight, factor))


@dataclass(frozen=True)
class TensorSource:
    """A tensor in memory: a buffer or parameter of a model passed as an object."""

    tensor: Tensor
    name: str

    @property
    def key(self) -> str:
        return f"memory:{id(self.tensor):x}"

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def read(self) -> Tensor:
        return self.tensor.detach()


@dataclass(frozen=True)
class SafetensorsSource:
    """A tensor of a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @property
    def key(self) -> str:
        return f"{os.path.realpath(self.path)}:{self.name}"

    def __str__(self) -> str:
        return f"{self.path.name}:{self.name}"

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def constant(tensor: Tensor, name: str) -> Weight:
    """Wrap a tensor that depends on the architecture only, such as a buffer."""
    return Leaf(TensorSource(tensor, name), constant=True)


def parameter(tensor: Tensor, name: str) -> Weight:
    """Wrap a trained tensor that is in memory."""
    return Leaf(TensorSource(tensor, name))


class _Recording(Tensor):
    """A tensor that stands in for a weight in torch code and records all calls."""

    weight: Weight

    @staticmethod
    def __new__(cls, weight: Weight) -> _Recording:
        self = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=torch.device("cpu"))
        self.weight = weight
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise LlmcError(
                "WEIGHTS_UNRECORDABLE",
                f"The conversion of a weight calls {func}, which changes a tensor in place.",
                "Convert the checkpoint with code that computes new tensors.",
            )
        args, kwargs = pytree.tree_map_only(_Recording, lambda t: t.weight, (args, kwargs or {}))
        if len(func._schema.returns) > 1 or str(func._schema.returns[0].type) != "Tensor":
            metas = pytree.tree_map_only(Weight, lambda w: w.meta(), (args, kwargs))
            count = len(func(*metas[0], **metas[1]))
            return [_Recording(Call(func, args, kwargs, output=i)) for i in range(count)]
        return _Recording(Call(func, args, kwargs))


def record(weight: Weight) -> Tensor:
    """Return a tensor that records torch code; `recorded` returns the expression."""
    return _Recording(weight)


def recorded(tensor: Tensor) -> Weight:
    """Return the expression of a result of torch code on `record`ed weights.

    A tensor that does not depend on recorded weights is a constant.
    """
    if not isinstance(tensor, _Recording):
        return constant(tensor, "recorded")
    return tensor.weight
