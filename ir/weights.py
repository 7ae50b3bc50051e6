"""Lazy weights: expressions over tensors that stay on disk until somebody asks for a value.

A `Weight` knows its shape and dtype for nothing. `evaluate()` reads what it needs, computes one tensor and
keeps at most the other results of its last call, so that memory is bounded by the largest tensor and not by the
model. A pass that merges three projections writes `concat([q, k, v])`: an expression, not a tensor.

Expressions are ATen calls whose arguments are weights. They are written by the constructors below, or recorded
from ordinary torch code by `record`, which is how the checkpoint conversions of transformers become expressions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import LlmcError

aten = torch.ops.aten


class WeightSource(Protocol):
    """Where a leaf's bytes are: a slice of a file, or memory."""

    @property
    def key(self) -> str: ...  # two sources with one key hold the same values
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> Tensor: ...


class Weight:
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self) -> Tensor:
        """The value, computed now and laid out contiguously."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        """The leaves that the value depends on, in order, repeated where they are used twice."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Names the value: equal keys mean equal tensors."""
        raise NotImplementedError

    @property
    def is_constant(self) -> bool:
        """Whether the value follows from the architecture alone."""
        return all(leaf.constant for leaf in self.leaves())

    @property
    def nbytes(self) -> int:
        """Bytes of the value, not of its sources."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def meta(self) -> Tensor:
        """A tensor without storage, of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, eq=False)
class Leaf(Weight):
    """A tensor as its source holds it.

    Attributes:
        constant: the value belongs to the architecture and not to the training (a table of frequencies, a mask):
            a pass may read it and compute with it.
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
    """An ATen call on weights and plain values; `output` picks one of several results."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int | None = None

    def __post_init__(self) -> None:
        value = self._run(lambda weight: weight.meta(), "meta")
        object.__setattr__(self, "shape", tuple(value.shape))
        object.__setattr__(self, "dtype", value.dtype)

    @property
    def key(self) -> str:
        arguments, structure = pytree.tree_flatten((self.args, self.kwargs))
        parts = [x.key if isinstance(x, Weight) else repr(x) for x in arguments]
        return hashlib.sha256(repr((str(self.target), self.output, parts, str(structure))).encode()).hexdigest()

    def evaluate(self) -> Tensor:
        if self.target in (aten.cat.default, aten.stack.default):
            return self._join()
        # What views were recorded on is contiguous; a transposed tensor would refuse some of them.
        if self.output is None:
            return self._run(lambda weight: weight.evaluate(), "cpu").contiguous()
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

    def _run(self, value_of: Callable[[Weight], Tensor], device: str) -> Tensor:
        result = self.run_whole(value_of, device)
        return result if self.output is None else result[self.output]

    def run_whole(self, value_of: Callable[[Weight], Tensor], device: str) -> Any:
        """All results of the call, whichever of them this is."""
        args, kwargs = pytree.tree_map(lambda x: value_of(x) if isinstance(x, Weight) else x, (self.args, self.kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": device}
        with torch.no_grad():
            return self.target(*args, **kwargs)

    def _join(self) -> Tensor:
        """Parts are read one by one into the result: merging never holds all parts beside it."""
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


# The last call of several results that was evaluated, by its key for all of them, and the results. Who asks for the
# codes of a rounded weight asks for its scales next, and rounding takes longer than everything else; one entry keeps
# memory bounded. The call is held with them, for a tensor that is gone would leave its key to another.
_recent: dict[str, tuple[Call, Any]] = {}


def _results_of(call: Call) -> Any:
    key = replace(call, output=0).key
    if key not in _recent:
        _recent.clear()  # before, so that two results are never held
        results = call.run_whole(lambda weight: weight.evaluate(), "cpu")
        _recent.clear()  # of a call of several results among its arguments
        _recent[key] = call, results
    return _recent[key][1]


def concat(parts: Sequence[Weight], dim: int) -> Weight:
    """The parts one behind the other along `dim`."""
    return parts[0] if len(parts) == 1 else Call(aten.cat.default, (list(parts), dim))


def transpose(weight: Weight, dim0: int = 0, dim1: int = 1) -> Weight:
    """Two dims swapped, laid out contiguously."""
    return Call(
        aten.clone.default,
        (Call(aten.transpose.int, (weight, dim0, dim1)),),
        {"memory_format": torch.contiguous_format},
    )


def rows(weight: Weight, start: int, end: int) -> Weight:
    """Some of the rows, one behind the other as they lie in the whole."""
    return Call(aten.slice.Tensor, (weight, 0, start, end))


def rows_of(weight: Weight) -> tuple[Weight, int] | None:
    """The whole that a weight is `rows` of, and the first of them."""
    if (
        isinstance(weight, Call)
        and weight.target is aten.slice.Tensor
        and weight.args[1] == 0
        and len(weight.args) == 4
        and isinstance(weight.args[2], int)
        and weight.args[2] >= 0  # torch may count from the end
    ):
        return weight.args[0], weight.args[2]
    return None


def cast(weight: Weight, dtype: torch.dtype) -> Weight:
    """The same values in another dtype; no expression where it has that dtype already."""
    return weight if weight.dtype == dtype else Call(aten._to_copy.default, (weight,), {"dtype": dtype})


def fold(weight: Weight, factor: Weight | float) -> Weight:
    """The weight times a number or a broadcastable weight."""
    overload = aten.mul.Tensor if isinstance(factor, Weight) else aten.mul.Scalar
    return Call(overload, (weight, factor))


@dataclass(frozen=True)
class TensorSource:
    """A tensor held in memory: a buffer, or a parameter of a model that was given as an object."""

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
    """One tensor of a safetensors file."""

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
    """A value of the architecture: a buffer, or what a pass computed."""
    return Leaf(TensorSource(tensor, name), constant=True)


def parameter(tensor: Tensor, name: str) -> Weight:
    """A trained value that is in memory."""
    return Leaf(TensorSource(tensor, name))


class _Recording(Tensor):
    """Stands for a weight in ordinary torch code and records what is done to it."""

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
                f"A weight is converted by {func}, which changes a tensor in place.",
                "Convert the checkpoint by code that computes new tensors.",
            )
        args, kwargs = pytree.tree_map_only(_Recording, lambda t: t.weight, (args, kwargs or {}))
        if len(func._schema.returns) > 1 or str(func._schema.returns[0].type) != "Tensor":
            metas = pytree.tree_map_only(Weight, lambda w: w.meta(), (args, kwargs))
            count = len(func(*metas[0], **metas[1]))
            return [_Recording(Call(func, args, kwargs, output=i)) for i in range(count)]
        return _Recording(Call(func, args, kwargs))


def record(weight: Weight) -> Tensor:
    """A tensor to run ordinary torch code on; `recorded` takes the expression out of what comes back."""
    return _Recording(weight)


def recorded(tensor: Tensor) -> Weight:
    """The expression behind a tensor that came out of code run on `record`ed weights."""
    if not isinstance(tensor, _Recording):
        return constant(tensor, "recorded")
    return tensor.weight
