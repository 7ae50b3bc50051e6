"""Searching by what to divide the channels of a linear's input, so that rounding changes its output least.

SmoothQuant asks for channels that are alike, so that inputs round well, and weighs them against the columns of the
matrix, which take what the channels lose (Xiao et al., 2023). AWQ asks for large columns where inputs are large, so
that the weights round well which matter (Lin et al., 2024). Both are one family of candidates, tried on real inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.ops.quantized import dequantize, round_activation
from ...kernels.ops.rounding import round_weight
from ...passes.quantize.rounding_plan import Choice

SMOOTHQUANT, AWQ = "smoothquant", "awq"
_ALPHAS = {SMOOTHQUANT: (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), AWQ: (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)}
# The error of a candidate is measured on so many inputs.
_SAMPLE = 256


@dataclass(frozen=True)
class Inputs:
    """What calibration keeps of the inputs of a linear.

    Attributes:
        largest, mean: of each channel's magnitude.
        sample: some inputs, evenly spread.
    """

    largest: Tensor
    mean: Tensor
    sample: Tensor

    @classmethod
    def of(cls, batches: list[Tensor]) -> Inputs:
        """Of what flowed through the model, [tokens, I] a batch."""
        count = sum(len(batch) for batch in batches)
        every = max(1, count // _SAMPLE)
        return cls(
            torch.stack([batch.abs().amax(0) for batch in batches]).amax(0),
            torch.stack([batch.abs().sum(0) for batch in batches]).sum(0) / count,
            torch.cat([batch[::every] for batch in batches]),
        )


@dataclass(frozen=True)
class Found:
    """The best candidate.

    Attributes:
        scales: what to divide each channel by.
        alpha: the exponent that made them.
        error, before: of the output, relative to its size, with and without them.
    """

    scales: Tensor
    alpha: float
    error: float
    before: float


def search_scales(
    inputs: Inputs,
    weight: Tensor,
    choice: Choice,
    family: str,
    input_block: int | None,
) -> Found | None:
    """Try a family of scales; None if none is better than leaving the channels as they are.

    Args:
        weight: [O, I], the rows of all linears that read the inputs.
        choice: what the weight is rounded to.
        family: "smoothquant" or "awq".
        input_block: channels of an input that are rounded to int8 together; 0: all; None: none.
    """
    wanted = inputs.sample @ weight.T
    size = wanted.square().sum()
    errors = {}
    best: Found | None = None
    for alpha, scales in _candidates(inputs, weight, family):
        got = _rounded_inputs(inputs.sample / scales, input_block) @ _rounded(weight * scales, choice).T
        error = float((got - wanted).square().sum() / size)
        errors[alpha] = error
        if alpha and error < min(errors[0.0], best.error if best else torch.inf):
            best = Found(scales, alpha, error, errors[0.0])
    return best


def _candidates(inputs: Inputs, weight: Tensor, family: str) -> Iterator[tuple[float, Tensor]]:
    """Exponents and scales, the first of them all ones."""
    statistic = inputs.largest if family == SMOOTHQUANT else inputs.mean
    # A channel that is always zero has any scale.
    statistic = statistic.clamp(min=max(1e-5 * float(statistic.max()), 1e-30))
    columns = weight.abs().amax(0)
    columns = columns.clamp(min=max(1e-5 * float(columns.max()), 1e-30))
    for alpha in _ALPHAS[family]:
        scales = statistic**alpha
        if family == SMOOTHQUANT and alpha:
            scales = scales / columns ** (1 - alpha)
        yield alpha, scales / (scales.max() * scales.min()).sqrt()


def _rounded(weight: Tensor, choice: Choice) -> Tensor:
    assert choice.grid is not None
    given = choice.grid.scheme, choice.group_size, choice.grid.symmetric
    codes, scales, zeros, multiples = round_weight(weight, *given)
    points, times = (part if part.numel() else None for part in (zeros, multiples))
    return dequantize(codes, scales, points, choice.grid.scheme, choice.group_size, multiples=times)


def _rounded_inputs(inputs: Tensor, block: int | None) -> Tensor:
    if block is None:
        return inputs
    blocks = inputs.unflatten(1, (-1, block or inputs.shape[1]))
    codes, scale = round_activation(blocks, "int8")
    return (codes * scale).flatten(1)
