"""Weights of quantized checkpoints: dequantized values and, if usable, codes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels.ops.quantized import dequantize
from .weights import Call, Leaf, Weight, concat, dim0_slice_of, slice_dim0

aten = torch.ops.aten

BLOCK_WEIGHTS = 1 << 20
"""Weights per block: output channels are dequantized in blocks, because intermediate tensors take several times the
memory of the weights."""


@dataclass(frozen=True, eq=False)
class StoredCodes(Weight):
    """A weight [O, I] stored as codes, scales and zero points.

    Its value is the dequantized weight, float32. The layout is that of `quant_linear`.

    Attributes:
        codes: packed; `kernels.ops.quantized` describes the layout of each scheme.
        scales: float32 [O, I/group_size].
        zeros: same shape as `scales`, in the dtype of the codes; None: symmetric.
    """

    codes: Weight
    scales: Weight
    zeros: Weight | None
    scheme: str
    group_size: int

    def __post_init__(self) -> None:
        codes_per_byte = 2 if self.scheme in ("int4", "nf4") else 1
        object.__setattr__(self, "shape", (self.codes.shape[0], self.codes.shape[1] * codes_per_byte))
        object.__setattr__(self, "dtype", torch.float32)

    @property
    def key(self) -> str:
        parts = [None if part is None else part.key for part in (self.codes, self.scales, self.zeros)]
        return hashlib.sha256(repr(("dequantize", parts, self.scheme, self.group_size)).encode()).hexdigest()

    def evaluate(self) -> Tensor:
        codes, scales = self.codes.evaluate(), self.scales.evaluate()
        zeros = None if self.zeros is None else self.zeros.evaluate()
        value = torch.empty(self.shape)
        channels = max(1, BLOCK_WEIGHTS // max(1, self.shape[1]))
        for start in range(0, self.shape[0], channels):
            block = slice(start, start + channels)
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
    """A weight of a quantized checkpoint whose codes fit no scheme of this compiler.

    Attributes:
        value: the dequantized weight.
        reason: why the codes cannot be used.
    """

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
    """Return the checkpoint's codes of a weight, or None if it has no usable ones.

    Codes are kept through slices and concatenations of output channels. Casts are ignored: codes with float32 scales
    are what the checkpoint means, and the cast only rounds their values.
    """
    result = _codes(weight)
    return result if isinstance(result, StoredCodes) else None


def why_dequantized(weight: Weight) -> str | None:
    """Return why a weight of a quantized checkpoint has no `stored_codes`.

    None if it has them, or if the checkpoint does not quantize it.
    """
    result = _codes(weight)
    return result if isinstance(result, str) else None


def _codes(weight: Weight) -> StoredCodes | str | None:
    """Return the codes of a weight, the reason against using them, or None."""
    if isinstance(weight, StoredCodes):
        return weight
    if isinstance(weight, OnlyNumbers):
        return weight.reason
    if not isinstance(weight, Call):
        return None
    if weight.target is aten._to_copy.default and weight.dtype.is_floating_point:
        return _codes(weight.args[0])
    if part := dim0_slice_of(weight):
        whole, start = part
        codes = _codes(whole)
        return _slice(codes, start, start + weight.shape[0]) if isinstance(codes, StoredCodes) else codes
    if weight.target is aten.cat.default and (weight.args[1:] or (weight.kwargs.get("dim", 0),)) == (0,):
        return _concat(weight.args[0])
    return _reason_of(weight)


def _slice(whole: StoredCodes, start: int, end: int) -> StoredCodes:
    return _apply(lambda parts: slice_dim0(parts[0], start, end), [whole])


def _concat(parts: list[Weight]) -> StoredCodes | str | None:
    results = [_codes(part) for part in parts]
    if reason := next((r for r in results if isinstance(r, str)), None):
        return reason
    codes = [r for r in results if isinstance(r, StoredCodes)]
    if not codes:
        return None
    if len(codes) < len(results):
        return "it is concatenated with weights that are not quantized"
    if len({(c.scheme, c.group_size, c.zeros is None) for c in codes}) > 1:
        return "it is concatenated with weights of another scheme, group size or symmetry"
    return _apply(lambda weights: concat(weights, 0), codes)


def _apply(combine: Callable[[list[Weight]], Weight], stored: list[StoredCodes]) -> StoredCodes:
    """Apply `combine` to the codes, to the scales and to the zero points."""
    zeros = [s.zeros for s in stored if s.zeros is not None]
    codes, scales = combine([s.codes for s in stored]), combine([s.scales for s in stored])
    return StoredCodes(codes, scales, combine(zeros) if zeros else None, stored[0].scheme, stored[0].group_size)


def _reason_of(call: Call) -> str | None:
    """Return why a call's result has no codes; None if no argument is quantized."""
    for argument in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(argument, Weight):
            codes = _codes(argument)
            if isinstance(codes, str):
                return codes
            if codes is not None:
                return f"it is changed by {call.target._schema.name.removeprefix('aten::')}"
    return None
