"""A quantized weight in the layouts of kernels.

A layout is a weight expression over the program's weights, so bytes that several graphs or ops read are written once.
Scales per group that repeat those of larger groups, or that are multiples, are computed in the graph. The runtime
does so once, when it opens the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto

from ....ir.weights import Call, Weight, cast, dim0_slice_of, slice_dim0
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


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight [O, I] as the arguments of `quant_linear` and `quant_embedding`."""

    codes: WeightValue
    scales: WeightValue
    zeros: WeightValue | None
    multiples: WeightValue | None
    scheme: str
    group_size: int

    @property
    def output_channels(self) -> int:
        return int(self.codes.shape[0])

    @property
    def is_packed(self) -> bool:
        """True if two codes share a byte."""
        return self.scheme in ("int4", "nf4")

    @property
    def input_channels(self) -> int:
        return int(self.codes.shape[1]) * (2 if self.is_packed else 1)

    @property
    def is_per_channel(self) -> bool:
        """True if each output channel has one scale and one zero point."""
        has_one_zero = self.zeros is None or self.zeros.shape[1] == 1
        return self.scales.shape[1] == 1 and self.multiples is None and has_one_zero

    def block(self, groups: Sequence[int]) -> int | None:
        """Return the group size in which kernels can read the weight, or None if none fits.

        Its own if supported, else the first that divides it.

        Args:
            groups: the group sizes that the kernels support, fastest first.
        """
        if self.group_size in groups and not self.is_per_channel:
            return self.group_size
        inputs = self.input_channels if self.is_per_channel else self.group_size
        return next((group for group in groups if inputs % group == 0), None)

    def stored_spacing(self, g: Lowering, group: int, dtype: torch.dtype) -> Value:
        """Return the same as `spacing`, as a weight that is stored in a dtype."""
        scales = self.scales.weight
        if self.multiples is not None:
            scales = Call(aten.mul.Tensor, (scales, cast(self.multiples.weight, scales.dtype)))
        scales = _repeated(scales, self.input_channels // group)
        return g.weight(f"{self.scales}.by_{group}.{str(dtype).removeprefix('torch.')}", cast(scales, dtype))

    def spacing(self, g: Lowering, group: int) -> Value:
        """Return the scale of each group of `group` input channels, [O, I/group]."""
        key = ("spacing", str(self.scales), str(self.multiples), group)
        if key not in g.memo:
            g.memo[key] = self._spacing(g, group)
        return g.memo[key]

    def _spacing(self, g: Lowering, group: int) -> Value:
        scales: Value = self.scales
        if self.multiples is not None:
            multiples = g.op("Cast", self.multiples, to=TensorProto.FLOAT)
            scales = Value(g.op("Mul", self.scales, multiples), scales.dtype, self.multiples.shape)
        own_groups, groups = int(scales.shape[1]), self.input_channels // group
        if own_groups == groups:
            return scales
        expanded = g.op("Unsqueeze", scales, g.constant([2]))
        repeated = g.op("Expand", expanded, g.constant([1, 1, groups // own_groups]))
        shape = (self.output_channels, groups)
        return Value(g.op("Reshape", repeated, g.constant(list(shape))), scales.dtype, shape)

    def output_scales(self, g: Lowering) -> Value:
        """Return the scale of each output channel, [O]."""
        return _flat(g, self.scales)

    def output_zeros(self, g: Lowering) -> Value | None:
        """Return the zero point of each output channel, [O]; None: symmetric."""
        return None if self.zeros is None else _flat(g, self.zeros)

    # Layouts of the ONNX standard ------------------------------------------------------------------------------------

    def elements(self, g: Lowering) -> Value:
        """Return the codes [O, I] in their ONNX element type."""
        kind = _ELEMENTS[self.scheme]
        name = f"{self.codes}.{TensorProto.DataType.Name(kind).lower()}"
        return g.weight(name, self.codes.weight, dtype=kind, shape=(self.output_channels, self.input_channels))

    def element_zeros(self, g: Lowering, shape: Sequence[int]) -> Value | None:
        """Return zero points in the element type of the codes; None: not needed.

        Args:
            shape: [O] or [O, I/group_size].
        """
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

    # Layouts of ONNX Runtime's kernels -------------------------------------------------------------------------------

    def unsigned(self, g: Lowering, shape: Sequence[int]) -> Value:
        """Return the codes as uint8, two 4-bit codes per byte, in a shape [O, ...]."""
        return g.weight(f"{self.codes}.unsigned_{len(shape)}d", self.unsigned_weight, shape=shape)

    @property
    def unsigned_weight(self) -> Weight:
        return self.codes.weight if self.is_packed else _unsigned(self.codes.weight)

    def unsigned_zeros(self, g: Lowering, block: int) -> Value | None:
        """Return the zero points of blocks as unsigned bytes, [O, I/block].

        Two 4-bit zero points share a byte: [O, (I/block + 1) / 2].
        """
        return None if self.zeros is None else g.weight(f"{self.zeros}.unsigned", self.unsigned_zeros_weight(block))

    def unsigned_zeros_weight(self, block: int) -> Weight:
        assert self.zeros is not None
        blocks, is_packed = self.input_channels // block, self.is_packed

        def make(zeros: Weight) -> Weight:
            repeated = _repeated(zeros, blocks)
            return _packed(repeated) if is_packed else _unsigned(repeated)

        return _before_slicing(make, self.zeros.weight)

    def high_nibble_first(self, g: Lowering) -> Value:
        """Return 4-bit codes in the flat layout of bitsandbytes, high nibble first."""

        def make(codes: Weight) -> Weight:
            return _nibbles(_shifted(codes, 4), Call(aten.bitwise_and.Scalar, (codes, 15)))

        swapped = _before_slicing(make, self.codes.weight)
        return g.weight(f"{self.codes}.high_first", swapped, shape=(self.output_channels * self.input_channels // 2,))


def _flat(g: Lowering, value: WeightValue) -> Value:
    return g.weight(f"{value}.flat", value.weight, shape=(int(value.shape[0]),))


def _unsigned(codes: Weight) -> Weight:
    """Convert int8 codes to uint8 by adding 128."""

    def make(codes: Weight) -> Weight:
        return Call(aten.bitwise_xor.Scalar, (Call(aten.view.dtype, (codes, torch.uint8)), 128))

    return _before_slicing(make, codes)


def _repeated(values: Weight, blocks: int) -> Weight:
    """Repeat the values of groups, [O, groups], to [O, blocks]."""
    repeats = blocks // values.shape[1]
    return values if repeats == 1 else Call(aten.repeat_interleave.self_int, (values, repeats, 1))


def _packed(codes: Weight) -> Weight:
    """Pack codes 0..15 [O, n] into bytes [O, (n + 1) / 2], low nibble first.

    If n is odd, the high nibble of the last byte is zero.
    """
    if codes.shape[1] % 2:
        codes = Call(aten.constant_pad_nd.default, (codes, [0, 1]))
    even, odd = (Call(aten.slice.Tensor, (codes, 1, first, codes.shape[1], 2)) for first in (0, 1))
    return _nibbles(even, odd)


def _nibbles(low: Weight, high: Weight) -> Weight:
    raised = Call(aten.bitwise_left_shift.Tensor_Scalar, (high, 4))
    return Call(aten.bitwise_or.Tensor, (low, raised))


def _shifted(codes: Weight, bits: int) -> Weight:
    return Call(aten.bitwise_right_shift.Tensor_Scalar, (codes, bits))


def _before_slicing(make: Callable[[Weight], Weight], weight: Weight) -> Weight:
    """Apply `make`, which works on each output channel separately, to a weight.

    Of a slice of output channels, convert the whole weight and then slice: only the whole is stored.
    """
    if part := dim0_slice_of(weight):
        whole, start = part
        return slice_dim0(make(whole), start, start + weight.shape[0])
    return make(weight)
