"""Choose the scale of each group that rounds important weights least."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.ops.quantized import levels_of
from ...kernels.ops.rounding import LARGEST_MULTIPLE, QuantizationParameters, default_parameters, nearest

# Shares of the plain scale to try. Below 1, a group's largest weights are clipped, and the others are rounded less.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
# The same for int4: changes of a group's multiple of its output channel's scale.
_CHANGES = (1, 0, -1, -2, -3, -4)


def best_parameters(
    weight: Tensor, importance: Tensor, scheme: str, group_size: int, symmetric: bool
) -> QuantizationParameters:
    """Return the scales of each group with the least weighted squared error.

    Args:
        weight: [O, I].
        importance: weight of the squared errors of each input channel, [I].
    """
    plain = default_parameters(weight, scheme, group_size, symmetric)
    groups = weight.float().unflatten(1, (-1, group_size))
    importance_by_group = importance.to(groups).view(1, -1, group_size)
    best, least = plain, torch.full(groups.shape[:2], torch.inf)
    for parameters in _candidates(groups, plain, scheme):
        error = ((_quantized(groups, parameters, scheme) - groups).square() * importance_by_group).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best = _choose(better, parameters, best)
    return best


def _candidates(groups: Tensor, plain: QuantizationParameters, scheme: str) -> Iterator[QuantizationParameters]:
    if plain.multiples is None:
        for share in _SHARES:
            yield QuantizationParameters(plain.scales * share)
        return
    symmetric = plain.zeros is None
    for change in _CHANGES:
        count = (plain.multiples.abs().int() + change).clamp(1, LARGEST_MULTIPLE[symmetric])
        for sign in (1, -1) if symmetric else (1,):
            multiples = (sign * count).to(torch.int8)
            if plain.zeros is None:
                yield QuantizationParameters(plain.scales, None, multiples)
                continue
            # The range keeps its middle: both ends are clipped alike.
            shrunk = count / plain.multiples
            lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            middle, half = (lowest + highest) / 2, (highest - lowest) / 2 * shrunk
            zeros = torch.round((half - middle) / (plain.scales * multiples)).clamp(0, 15)
            yield QuantizationParameters(plain.scales, zeros.to(torch.uint8), multiples)


def _quantized(groups: Tensor, parameters: QuantizationParameters, scheme: str) -> Tensor:
    """Round the groups to the nearest numbers of the grid."""
    spacing = parameters.spacing.unsqueeze(2)
    zeros = None if parameters.zeros is None else parameters.zeros.unsqueeze(2)
    return levels_of(nearest(groups, spacing, zeros, scheme), zeros, scheme).mul_(spacing)


def _choose(better: Tensor, one: QuantizationParameters, other: QuantizationParameters) -> QuantizationParameters:
    """Choose one or the other for each group.

    The scale of an output channel, if there is one, is the same in both.
    """
    scales = torch.where(better, one.scales, other.scales) if one.multiples is None else other.scales
    return QuantizationParameters(
        scales, _where(better, one.zeros, other.zeros), _where(better, one.multiples, other.multiples)
    )


def _where(better: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.where(better, one, other)
