"""Convert a checkpoint's groups to groups of one uniform size."""

from __future__ import annotations

import math

import torch

from ....ir.stored import OnlyNumbers, StoredCodes
from ....ir.weights import Weight
from .layout import expression, repeated
from .parts import Parts


def from_groups(
    parts: Parts, codes: Weight, scales: Weight, zeros: Weight | None, scheme: str, group_size: int, order: str = ""
) -> Weight:
    """Build the weight [O, I] from codes with scales and zero points [O, groups].

    The last group may be shorter than the others. Then all groups are split to the greatest common divisor of the
    group size and I.

    Args:
        parts: the linear's tensors.
        codes: codes, packed as `scheme` packs them.
        scales: float32 [O, groups].
        zeros: zero points [O, groups]; None for symmetric codes.
        scheme: name of the scheme.
        group_size: input channels per group.
        order: name of the tensor that maps each input channel to its group, if the format has one. The tensor is
            read here, because it decides the kind of weight that is returned. It is small.
    """
    inputs = codes.shape[1] * (2 if scheme in ("int4", "nf4") else 1)
    group_size = min(group_size, inputs)
    if order in parts and (index := _order(parts, order, group_size, inputs, scales.shape[1])):
        scales, zeros = _by_input(scales, index), zeros and _by_input(zeros, index)
        reason = f"its groups are not consecutive input channels ({order})"
        return OnlyNumbers(StoredCodes(codes, scales, zeros, scheme, 1), reason)
    size = math.gcd(group_size, inputs)
    if size != group_size:
        times, length = group_size // size, inputs // size
        scales, zeros = repeated(scales, times, length), zeros and repeated(zeros, times, length)
    return StoredCodes(codes, scales, zeros, scheme, size)


def _by_input(by_group: Weight, index: Weight) -> Weight:
    return expression(lambda x, i: x.index_select(1, i), by_group, index)


def _order(parts: Parts, part: str, group_size: int, inputs: int, groups: int) -> Weight | None:
    """The group of each input channel, or None if groups are consecutive channels."""
    leaf = parts.need(part, (inputs,), (torch.int32, torch.int64))
    index = leaf.evaluate().long()
    if torch.equal(index, torch.arange(inputs) // group_size):
        return None
    if not bool(((index >= 0) & (index < groups)).all()):
        raise parts.mismatch(part, f"it has groups outside 0 to {groups - 1}")
    return leaf
