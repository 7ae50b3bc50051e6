"""A rounded weight as kernels take it: its codes, scales and zero points in their layouts, each written once.

A layout is an expression over what the program holds, so bytes that several graphs or ops read are written once. What
is large only because it repeats itself, the scale of each group, is computed in the graph: the runtime does so once,
when it opens the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto

from ....ir.weights import Call, Weight, rows, rows_of
from .graph import Value
from .lower import Lowering, WeightValue

aten = torch.ops.aten

_ELEMENTS = {
    "int8": TensorProto.INT8,
    "int4": TensorProto.UINT4,
    "nf4": TensorProto.UINT4,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "fp8_e5m2": TensorProto.FLOAT8E5M2,
}
# Groups that ONNX Runtime's kernels take, the fastest first.
_GROUPS = (128, 64, 32, 16, 256)


@dataclass(frozen=True)
class RoundedMatrix:
    """A weight [O, I] in the parts that `quant_linear` and `quant_embedding` take."""

    codes: WeightValue
    scales: WeightValue
    zeros: WeightValue | None
    multiples: WeightValue | None
    scheme: str
    group_size: int

    @property
    def rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.scheme in ("int4", "nf4")

    @property
    def columns(self) -> int:
        return int(self.codes.shape[1]) * (2 if self.is_packed else 1)

    @property
    def has_one_step(self) -> bool:
        """Whether all of a row has one spacing and one zero point."""
        alone = self.zeros is None or self.zeros.shape[1] == 1
        return self.scales.shape[1] == 1 and self.multiples is None and alone

    @property
    def block(self) -> int | None:
        """The group in which ONNX Runtime's kernels read it: its own, else the fastest that divides, if any."""
        if self.group_size in _GROUPS and not self.has_one_step:
            return self.group_size
        span = self.columns if self.has_one_step else self.group_size
        return next((group for group in _GROUPS if span % group == 0), None)

    def spacing(self, g: Lowering, group: int) -> Value:
        """The distance of neighbouring codes in each group of so many inputs, [O, I/group]."""
        key = ("spacing", str(self.scales), str(self.multiples), group)
        if key not in g.memo:
            g.memo[key] = self._spacing(g, group)
        return g.memo[key]

    def _spacing(self, g: Lowering, group: int) -> Value:
        found: Value = self.scales
        if self.multiples is not None:
            times = g.op("Cast", self.multiples, to=TensorProto.FLOAT)
            found = Value(g.op("Mul", self.scales, times), found.dtype, self.multiples.shape)
        groups, wanted = int(found.shape[1]), self.columns // group
        if groups == wanted:
            return found
        spread = g.op("Expand", g.op("Unsqueeze", found, g.constant([2])), g.constant([1, 1, wanted // groups]))
        shape = (self.rows, wanted)
        return Value(g.op("Reshape", spread, g.constant(list(shape))), found.dtype, shape)

    def row_scales(self, g: Lowering) -> Value:
        """The one scale of each row, [O]."""
        return _flat(g, self.scales)

    def row_zeros(self, g: Lowering) -> Value | None:
        """The one zero point of each row, [O]."""
        return None if self.zeros is None else _flat(g, self.zeros)

    # The standard's layouts ------------------------------------------------------------------------------------------

    def elements(self, g: Lowering) -> Value:
        """Codes [O, I] in the element type that ONNX has for them."""
        kind = _ELEMENTS[self.scheme]
        name = f"{self.codes}.{TensorProto.DataType.Name(kind).lower()}"
        return g.weight(name, self.codes.weight, dtype=kind, shape=(self.rows, self.columns))

    def element_zeros(self, g: Lowering, shape: Sequence[int]) -> Value | None:
        """Zero points in the codes' element type, in one of the shapes [O] and [O, I/group]."""
        name, blocks = f"{self.codes}.zeros_{len(shape)}d", [*shape, 1][1]
        repeated = None if self.zeros is None else _repeated(self.zeros.weight, blocks)
        if self.scheme != "int4":
            return None if repeated is None else g.weight(name, repeated, shape=shape)
        if repeated is None:
            count = (torch.Size(shape).numel() + 1) // 2
            packed: Weight = Call(aten.full.default, ((count,), 0x88), {"dtype": torch.uint8})
        else:
            packed = _packed(Call(aten.view.default, (repeated, [1, -1])))
        return g.weight(name, packed, dtype=TensorProto.UINT4, shape=shape)

    # ONNX Runtime's layouts ------------------------------------------------------------------------------------------

    def unsigned(self, g: Lowering, shape: Sequence[int]) -> Value:
        """Codes as bytes that count from zero up, two of 4 bits in one, in a shape [O, ...]."""
        return g.weight(f"{self.codes}.unsigned_{len(shape)}d", self.unsigned_weight, shape=shape)

    @property
    def unsigned_weight(self) -> Weight:
        return self.codes.weight if self.is_packed else _unsigned(self.codes.weight)

    def unsigned_zeros(self, g: Lowering, block: int) -> Value | None:
        """Zero points of blocks, [O, I/block], two of 4 bits in a byte of their row."""
        return None if self.zeros is None else g.weight(f"{self.zeros}.unsigned", self.unsigned_zeros_weight(block))

    def unsigned_zeros_weight(self, block: int) -> Weight:
        assert self.zeros is not None
        blocks, is_packed = self.columns // block, self.is_packed

        def make(zeros: Weight) -> Weight:
            repeated = _repeated(zeros, blocks)
            return _packed(repeated) if is_packed else _unsigned(repeated)

        return _by_rows(make, self.zeros.weight)

    def high_nibble_first(self, g: Lowering) -> Value:
        """Codes of 4 bits in the order of bitsandbytes, all rows one behind the other."""
        turned = _by_rows(lambda w: _nibbles(_shifted(w, 4), Call(aten.bitwise_and.Scalar, (w, 15))), self.codes.weight)
        return g.weight(f"{self.codes}.high_first", turned, shape=(self.rows * self.columns // 2,))


def _flat(g: Lowering, column: WeightValue) -> Value:
    return g.weight(f"{column}.flat", column.weight, shape=(int(column.shape[0]),))


def _unsigned(codes: Weight) -> Weight:
    """int8 codes as bytes around 128."""
    return _by_rows(lambda w: Call(aten.bitwise_xor.Scalar, (Call(aten.view.dtype, (w, torch.uint8)), 128)), codes)


def _repeated(zeros: Weight, blocks: int) -> Weight:
    """A zero point for each of so many blocks of a row."""
    times = blocks // zeros.shape[1]
    return zeros if times == 1 else Call(aten.repeat_interleave.self_int, (zeros, times, 1))


def _packed(codes: Weight) -> Weight:
    """Codes 0..15 [O, n] in bytes [O, (n + 1) / 2], the even one low; the last one of an odd row is alone."""
    if codes.shape[1] % 2:
        codes = Call(aten.constant_pad_nd.default, (codes, [0, 1]))
    even, odd = (Call(aten.slice.Tensor, (codes, 1, first, codes.shape[1], 2)) for first in (0, 1))
    return _nibbles(even, odd)


def _nibbles(low: Weight, high: Weight) -> Weight:
    raised = Call(aten.bitwise_left_shift.Tensor_Scalar, (high, 4))
    return Call(aten.bitwise_or.Tensor, (low, raised))


def _shifted(codes: Weight, bits: int) -> Weight:
    return Call(aten.bitwise_right_shift.Tensor_Scalar, (codes, bits))


def _by_rows(make: Callable[[Weight], Weight], weight: Weight) -> Weight:
    """What `make` makes of a weight row by row; of some rows it is rows of what it makes of all, which is stored."""
    if part := rows_of(weight):
        whole, first = part
        return rows(make(whole), first, first + weight.shape[0])
    return make(weight)
