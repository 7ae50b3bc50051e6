"""Rounding weights to codes, scales and multiples: the plain way, each weight to the nearest code.

Ops of their own, so that a lazy weight can be the rounding of another. They occur in no program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .op import op
from .quantized import pack_nibbles

# Codes -8..7 times 15 stay within int8, so a 4-bit weight is also an 8-bit one.
LARGEST_MULTIPLE = 15


# Rows are rounded in blocks of so many weights: what is computed on the way takes several times their memory.
_BLOCK = 1 << 20


@op
def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [O, I] and scales [O, 1]: the largest weight of a row becomes 127."""
    return _by_rows(weight, _round_int8)


@op
def round_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 [O, I/2], scales [O, 1] and multiples int8 [O, I/group_size].

    The weight farthest from zero in a group becomes code -8, whichever sign it has: the multiple is negative then.
    """
    return _by_rows(weight, lambda rows: _round_int4(rows, group_size))


def _round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    scales = _nonzero(wide.abs().amax(1, keepdim=True) / 127)
    return torch.round(wide / scales).clamp(-127, 127).to(torch.int8), scales


def _round_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.float().unflatten(1, (-1, group_size))
    farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    wanted = farthest / -8
    scales = _nonzero(wanted.abs().amax(1, keepdim=True) / LARGEST_MULTIPLE)
    multiples = torch.round(wanted / scales)
    multiples = torch.where(multiples == 0, torch.where(wanted < 0, -1.0, 1.0), multiples)
    steps = (scales * multiples).unsqueeze(2)
    codes = torch.round(groups / steps).clamp(-8, 7) + 8
    return pack_nibbles(codes.flatten(1)), scales, multiples.to(torch.int8)


def _by_rows(weight: Tensor, rounded: Callable[[Tensor], tuple[Tensor, ...]]) -> Any:
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    if weight.shape[0] <= rows or weight.is_meta:  # only the shapes are asked for
        return rounded(weight)
    results: tuple[Tensor, ...] = ()
    for start in range(0, weight.shape[0], rows):
        made = rounded(weight[start : start + rows])
        if not results:
            results = tuple(part.new_empty(weight.shape[0], *part.shape[1:]) for part in made)
        for result, part in zip(results, made, strict=True):
            result[start : start + rows] = part
    return results


def _nonzero(scales: Tensor) -> Tensor:
    """A row of zeros has any scale but zero."""
    return torch.where(scales > 0, scales, 1.0)
