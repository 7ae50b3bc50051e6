"""Weights that a checkpoint holds as codes: the numbers that they stand for, and the codes for who can use them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels.ops.quantized import dequantize
from .weights import Call, Leaf, Weight, concat, rows, rows_of

aten = torch.ops.aten

# Rows are turned to numbers in blocks of so many weights: what is computed on the way takes several times their memory.
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class StoredCodes(Weight):
    """A weight [O, I] of codes, scales and zero points, as `quant_linear` takes them; its value is float32.

    Attributes:
        codes: packed by the scheme, see `kernels.ops.quantized`.
        scales: float32 [O, I/group_size].
        zeros: like `scales`, in the codes' dtype; None for symmetric codes.
    """

    codes: Weight
    scales: Weight
    zeros: Weight | None
    scheme: str
    group_size: int

    def __post_init__(self) -> None:
        packed = 2 if self.scheme in ("int4", "nf4") else 1
        object.__setattr__(self, "shape", (self.codes.shape[0], self.codes.shape[1] * packed))
        object.__setattr__(self, "dtype", torch.float32)

    @property
    def key(self) -> str:
        parts = [None if part is None else part.key for part in (self.codes, self.scales, self.zeros)]
        return hashlib.sha256(repr(("dequantize", parts, self.scheme, self.group_size)).encode()).hexdigest()

    def evaluate(self) -> Tensor:
        codes, scales = self.codes.evaluate(), self.scales.evaluate()
        zeros = None if self.zeros is None else self.zeros.evaluate()
        value = torch.empty(self.shape)
        step = max(1, _BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            block = slice(start, start + step)
            zero = None if zeros is None else zeros[block]
            value[block] = dequantize(codes[block], scales[block], zero, self.scheme, self.group_size)
        return value

    def leaves(self) -> Iterator[Leaf]:
        for part in (self.codes, self.scales, self.zeros):
            if part is not None:
                yield from part.leaves()

    def __repr__(self) -> str:
        return f"dequantize({self.codes}, {self.scales}, {self.zeros}, {self.scheme!r}, {self.group_size})"


@dataclass(frozen=True, eq=False)
class OnlyNumbers(Weight):
    """A weight that a checkpoint holds as codes which no scheme here can take over, and why."""

    value: Weight
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.value.shape)
        object.__setattr__(self, "dtype", self.value.dtype)

    @property
    def key(self) -> str:
        return self.value.key

    def evaluate(self) -> Tensor:
        return self.value.evaluate()

    def leaves(self) -> Iterator[Leaf]:
        return self.value.leaves()

    def __repr__(self) -> str:
        return repr(self.value)


def stored_codes(weight: Weight) -> StoredCodes | None:
    """The checkpoint's own codes of a weight, of rows of one, and of several one below the other.

    Looks through a cast, for codes times float32 scales are what was meant before it rounded.
    """
    found = _codes(weight)
    return found if isinstance(found, StoredCodes) else None


def why_dequantized(weight: Weight) -> str | None:
    """Why a weight of a quantized checkpoint has no `stored_codes`; None if it has, or never was quantized."""
    found = _codes(weight)
    return found if isinstance(found, str) else None


def _codes(weight: Weight) -> StoredCodes | str | None:
    if isinstance(weight, StoredCodes):
        return weight
    if isinstance(weight, OnlyNumbers):
        return weight.reason
    if not isinstance(weight, Call):
        return None
    if weight.target is aten._to_copy.default and weight.dtype.is_floating_point:
        return _codes(weight.args[0])
    if part := rows_of(weight):
        whole, start = part
        found = _codes(whole)
        return _rows(found, start, start + weight.shape[0]) if isinstance(found, StoredCodes) else found
    if weight.target is aten.cat.default and (weight.args[1:] or (weight.kwargs.get("dim", 0),)) == (0,):
        return _concat(weight.args[0])
    return _lost(weight)


def _rows(whole: StoredCodes, start: int, end: int) -> StoredCodes:
    return _each(lambda parts: rows(parts[0], start, end), [whole])


def _concat(parts: list[Weight]) -> StoredCodes | str | None:
    found = [_codes(part) for part in parts]
    if reason := next((f for f in found if isinstance(f, str)), None):
        return reason
    codes = [f for f in found if isinstance(f, StoredCodes)]
    if not codes:
        return None
    if len(codes) < len(found):
        return "it is joined with weights that are not quantized"
    if len({(c.scheme, c.group_size, c.zeros is None) for c in codes}) > 1:
        return "it is joined with weights that are quantized another way"
    return _each(lambda weights: concat(weights, 0), codes)


def _each(join: Callable[[list[Weight]], Weight], given: list[StoredCodes]) -> StoredCodes:
    """What `join` makes of the codes, of the scales and of the zero points."""
    zeros = [g.zeros for g in given if g.zeros is not None]
    codes, scales = join([g.codes for g in given]), join([g.scales for g in given])
    return StoredCodes(codes, scales, join(zeros) if zeros else None, given[0].scheme, given[0].group_size)


def _lost(call: Call) -> str | None:
    """The reason for an expression that changes what it is given in a way that codes can't follow."""
    for argument in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(argument, Weight):
            found = _codes(argument)
            if isinstance(found, str):
                return found
            if found is not None:
                return f"it is changed by {call.target._schema.name.removeprefix('aten::')}"
    return None
