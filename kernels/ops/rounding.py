"""Quantize weights: choose the scales of each group, round to nearest codes.

`round_weight` is an op, so that a weight expression can quantize another weight. It does not occur in programs.
Calibration chooses scales or codes differently, and uses the other functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .op import op
from .quantized import FLOAT8, NF4, nonzero, pack_nibbles

# The largest multiple, by symmetric. An int4 weight is a small integer times the scale of its output channel, and
# this integer fits into int8: codes -8..7 times 15, or with zero points -15..15 times 8. So both 4-bit and 8-bit
# kernels can compute the layer.
LARGEST_MULTIPLE = {True: 15, False: 8}

BLOCK_WEIGHTS = 1 << 20
"""Weights per block: output channels are quantized in blocks, because intermediate tensors take several times the
memory of the weights."""

_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class QuantizationParameters(NamedTuple):
    """The quantization parameters of a weight, which define its possible values.

    Attributes:
        scales: [O, groups], or [O, 1] with multiples.
        zeros: uint8 [O, groups], the zero points; None: symmetric.
        multiples: int8 [O, groups], the group's scale as a multiple of its output channel's scale; None: all 1.
    """

    scales: Tensor
    zeros: Tensor | None = None
    multiples: Tensor | None = None

    @property
    def spacing(self) -> Tensor:
        """The scale of each group, multiples included, [O, groups]."""
        return self.scales if self.multiples is None else self.scales * self.multiples


@op
def round_weight(
    weight: Tensor, scheme: str, group_size: int, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize a weight [O, I], rounding to the nearest codes.

    Returns `(codes, scales, zeros, multiples)`. `zeros` and `multiples` are [O, 0] if the scheme has none.

    Args:
        scheme: "int8", "int4", "fp8", "fp8_e5m2" or "nf4"; `quantized` describes their layout.
        group_size: input channels that share a scale; 0: one scale for the whole weight.
        symmetric: True: all groups have the same zero point. False: int4 fits the range of codes to each group.
    """
    if group_size:
        return _by_output_channels(weight, lambda part: _quantize(part, scheme, group_size, symmetric, None))
    largest = weight.abs().amax().float()
    return _by_output_channels(weight, lambda part: _quantize(part, scheme, weight.shape[1], symmetric, largest))


def default_parameters(
    weight: Tensor, scheme: str, group_size: int, symmetric: bool, largest: Tensor | None = None
) -> QuantizationParameters:
    """Return scales that map the largest magnitude of each group to the largest code.

    For symmetric int4 it maps to code -8, whatever its sign: the multiple is negative if the weight is positive.

    Args:
        largest: the magnitude to map to the largest code, instead of each group's own.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    if scheme == "int4":
        return _plain_int4(groups) if symmetric else _plain_int4_with_zeros(groups)
    farthest = groups.abs().amax(2) if largest is None else largest.expand(groups.shape[:2])
    largest_code = {"int8": 127.0, "nf4": 1.0}.get(scheme) or torch.finfo(FLOAT8[scheme]).max
    return QuantizationParameters(nonzero(farthest / largest_code))


def codes_of(weight: Tensor, parameters: QuantizationParameters, scheme: str, group_size: int) -> Tensor:
    """Return the nearest code of each weight, unpacked, [O, I]."""
    groups = weight.float().unflatten(1, (-1, group_size))
    zeros = parameters.zeros
    codes = nearest(groups, parameters.spacing.unsqueeze(2), None if zeros is None else zeros.unsqueeze(2), scheme)
    return codes.flatten(1)


def nearest(values: Tensor, spacing: Tensor, zeros: Tensor | None, scheme: str) -> Tensor:
    """Return the nearest codes of `values`.

    `spacing` (the scales) and `zeros` must broadcast with `values`. Ties round to the value that is an even number
    of scales from zero (fp8: to the even code; nf4: to the smaller).
    """
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
    """Pack codes into their stored layout."""
    return pack_nibbles(codes) if scheme in ("int4", "nf4") else codes


def _quantize(weight: Tensor, scheme: str, group_size: int, symmetric: bool, largest: Tensor | None) -> _Parts:
    grid = default_parameters(weight, scheme, group_size, symmetric, largest)
    codes = codes_of(weight, grid, scheme, group_size)
    empty = (weight.new_empty(weight.shape[0], 0, dtype=dtype) for dtype in (torch.uint8, torch.int8))
    zeros, multiples = (b if a is None else a for a, b in zip(grid[1:], empty, strict=True))
    return packed(codes, scheme), grid.scales, zeros, multiples


def _plain_int4(groups: Tensor) -> QuantizationParameters:
    farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    exact = farthest / -8  # the group scales before they are rounded to multiples
    scales = nonzero(exact.abs().amax(1, keepdim=True) / LARGEST_MULTIPLE[True])
    multiples = torch.round(exact / scales)
    multiples = torch.where(multiples == 0, torch.where(exact < 0, -1.0, 1.0), multiples)
    return QuantizationParameters(scales, None, multiples.to(torch.int8))


def _plain_int4_with_zeros(groups: Tensor) -> QuantizationParameters:
    lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    exact = (highest - lowest) / 15
    scales = nonzero(exact.amax(1, keepdim=True) / LARGEST_MULTIPLE[False])
    multiples = torch.round(exact / scales).clamp(min=1)
    zeros = torch.round(-lowest / (scales * multiples)).clamp(0, 15)
    return QuantizationParameters(scales, zeros.to(torch.uint8), multiples.to(torch.int8))


def _by_output_channels(weight: Tensor, quantize: Callable[[Tensor], _Parts]) -> _Parts:
    channels = max(1, BLOCK_WEIGHTS // max(1, weight.shape[1]))
    if weight.shape[0] <= channels or weight.is_meta:  # on meta only the shapes are computed
        return quantize(weight)
    results: list[Tensor] = []
    for start in range(0, weight.shape[0], channels):
        block = quantize(weight[start : start + channels])
        if not results:
            results = [part.new_empty(weight.shape[0], *part.shape[1:]) for part in block]
        for result, part in zip(results, block, strict=True):
            result[start : start + channels] = part
    codes, scales, zeros, multiples = results
    return codes, scales, zeros, multiples
