"""From the groups of a checkpoint to groups that one size describes."""

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
    """The weight [O, I] of codes whose scales and zero points are [O, groups], the last group perhaps cut off.

    Where it is cut off, groups become as small as their largest common divisor with the row.

    Args:
        order: the part that holds each input's group, if the checkpoint has it. It is read here and now, for what the
            weight is hangs on it, and it is small.
    """
    inputs = codes.shape[1] * (2 if scheme in ("int4", "nf4") else 1)
    group_size = min(group_size, inputs)
    if order in parts and (index := _order(parts, order, group_size, inputs, scales.shape[1])):
        scales, zeros = _by_input(scales, index), zeros and _by_input(zeros, index)
        reason = f"its inputs are grouped in another order than they stand in ({order})"
        return OnlyNumbers(StoredCodes(codes, scales, zeros, scheme, 1), reason)
    size = math.gcd(group_size, inputs)
    if size != group_size:
        times, length = group_size // size, inputs // size
        scales, zeros = repeated(scales, times, length), zeros and repeated(zeros, times, length)
    return StoredCodes(codes, scales, zeros, scheme, size)


def _by_input(by_group: Weight, index: Weight) -> Weight:
    return expression(lambda x, i: x.index_select(1, i), by_group, index)


def _order(parts: Parts, part: str, group_size: int, inputs: int, groups: int) -> Weight | None:
    """The group of each input, unless they follow one another as they do in a plain checkpoint."""
    leaf = parts.need(part, (inputs,), (torch.int32, torch.int64))
    index = leaf.evaluate().long()
    if torch.equal(index, torch.arange(inputs) // group_size):
        return None
    if not bool(((index >= 0) & (index < groups)).all()):
        raise parts.mismatch(part, f"it names groups other than 0 to {groups - 1}")
    return leaf
