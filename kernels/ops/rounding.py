"""Rounding weights to codes: how the numbers of a grid are spaced, and which of them is nearest.

`round_weight` is an op of its own, so that a lazy weight can be the rounding of another. It occurs in no program.
Calibration chooses the spacing, or the codes, by more than one weight at a time, and shares everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .op import op
from .quantized import FLOAT8, NF4, nonzero, pack_nibbles

# A 4-bit weight is a small integer times its row's scale, and that integer fits in int8: codes -8..7 times 15, or
# -15..15 times 8 where groups have zero points. So one matrix of integers serves kernels of either width.
LARGEST_MULTIPLE = {True: 15, False: 8}

# Rows are rounded in blocks of so many weights: what is computed on the way takes several times their memory.
_BLOCK = 1 << 20


_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class GridScales(NamedTuple):
    """How the numbers are spaced that a group of weights can become.

    Attributes:
        scales: [O, groups], or [O, 1] where groups have multiples of their row's.
        zeros: uint8 [O, groups], the code of zero, where it isn't the same for all.
        multiples: int8 [O, groups], how many times its row's scale a group's is; None: once.
    """

    scales: Tensor
    zeros: Tensor | None = None
    multiples: Tensor | None = None

    @property
    def spacing(self) -> Tensor:
        """The distance of neighbouring codes, [O, groups]."""
        return self.scales if self.multiples is None else self.scales * self.multiples


@op
def round_weight(
    weight: Tensor, scheme: str, group_size: int, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros and multiples of a weight [O, I], each number to the nearest; empty where there are none.

    Args:
        scheme: "int8", "int4", "fp8", "fp8_e5m2" or "nf4", whose packing `quantized` tells.
        group_size: inputs that share a scale; 0: all weights do.
        symmetric: whether zero has the same code in all groups; otherwise int4's range fits each group's own.
    """
    if group_size:
        return _by_rows(weight, lambda rows: _rounded(rows, scheme, group_size, symmetric, None))
    largest = weight.abs().amax().float()
    return _by_rows(weight, lambda rows: _rounded(rows, scheme, weight.shape[1], symmetric, largest))


def plain_steps(
    weight: Tensor, scheme: str, group_size: int, symmetric: bool, largest: Tensor | None = None
) -> GridScales:
    """The spacing by which the weight farthest from zero in a group is the grid's farthest number.

    In int4 it becomes code -8, whichever sign it has: the multiple is negative then.

    Args:
        largest: the magnitude that the grid's end stands for, instead of each group's own.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    if scheme == "int4":
        return _plain_int4(groups) if symmetric else _plain_int4_with_zeros(groups)
    farthest = groups.abs().amax(2) if largest is None else largest.expand(groups.shape[:2])
    end = {"int8": 127.0, "nf4": 1.0}.get(scheme) or torch.finfo(FLOAT8[scheme]).max
    return GridScales(nonzero(farthest / end))


def codes_of(weight: Tensor, steps: GridScales, scheme: str, group_size: int) -> Tensor:
    """The nearest code of each weight, unpacked, [O, I]; halves go to the even one."""
    groups = weight.float().unflatten(1, (-1, group_size))
    zeros = steps.zeros
    codes = nearest(groups, steps.spacing.unsqueeze(2), None if zeros is None else zeros.unsqueeze(2), scheme)
    return codes.flatten(1)


def nearest(values: Tensor, spacing: Tensor, zeros: Tensor | None, scheme: str) -> Tensor:
    """The nearest codes of values whose spacing and zero points broadcast with them."""
    scaled = values / spacing
    if scheme == "int8":
        return torch.round(scaled).clamp(-127, 127).to(torch.int8)
    if scheme == "int4":
        return (torch.round(scaled) + (8 if zeros is None else zeros)).clamp(0, 15).to(torch.uint8)
    if scheme == "nf4":
        levels = torch.tensor(NF4, dtype=scaled.dtype, device=scaled.device)
        return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    largest = torch.finfo(FLOAT8[scheme]).max
    return scaled.clamp(-largest, largest).to(FLOAT8[scheme])


def packed(codes: Tensor, scheme: str) -> Tensor:
    """Codes as they are stored."""
    return pack_nibbles(codes) if scheme in ("int4", "nf4") else codes


def _rounded(weight: Tensor, scheme: str, group_size: int, symmetric: bool, largest: Tensor | None) -> _Parts:
    steps = plain_steps(weight, scheme, group_size, symmetric, largest)
    codes = codes_of(weight, steps, scheme, group_size)
    none = (weight.new_empty(weight.shape[0], 0, dtype=dtype) for dtype in (torch.uint8, torch.int8))
    zeros, multiples = (b if a is None else a for a, b in zip(steps[1:], none, strict=True))
    return packed(codes, scheme), steps.scales, zeros, multiples


def _plain_int4(groups: Tensor) -> GridScales:
    farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    wanted = farthest / -8
    scales = nonzero(wanted.abs().amax(1, keepdim=True) / LARGEST_MULTIPLE[True])
    multiples = torch.round(wanted / scales)
    multiples = torch.where(multiples == 0, torch.where(wanted < 0, -1.0, 1.0), multiples)
    return GridScales(scales, None, multiples.to(torch.int8))


def _plain_int4_with_zeros(groups: Tensor) -> GridScales:
    lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    wanted = (highest - lowest) / 15
    scales = nonzero(wanted.amax(1, keepdim=True) / LARGEST_MULTIPLE[False])
    multiples = torch.round(wanted / scales).clamp(min=1)
    zeros = torch.round(-lowest / (scales * multiples)).clamp(0, 15)
    return GridScales(scales, zeros.to(torch.uint8), multiples.to(torch.int8))


def _by_rows(weight: Tensor, rounded: Callable[[Tensor], _Parts]) -> _Parts:
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    if weight.shape[0] <= rows or weight.is_meta:  # only the shapes are asked for
        return rounded(weight)
    results: list[Tensor] = []
    for start in range(0, weight.shape[0], rows):
        made = rounded(weight[start : start + rows])
        if not results:
            results = [part.new_empty(weight.shape[0], *part.shape[1:]) for part in made]
        for result, part in zip(results, made, strict=True):
            result[start : start + rows] = part
    codes, scales, zeros, multiples = results
    return codes, scales, zeros, multiples
