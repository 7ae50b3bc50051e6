"""Search for scales of a linear's input channels that minimize rounding errors.

Inputs are divided by the scales, and the weight's input channels are multiplied by them. SmoothQuant makes the input
channels similar in size, so that inputs round well, and balances this against the weight, which becomes less even (Xiao
et al., 2023). AWQ enlarges the weight's channels where inputs are large, so that the weights that matter round well
(Lin et al., 2024). In both, candidates differ in one exponent and are compared on real inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.ops.quantized import dequantize, quantize_activation
from ...kernels.ops.rounding import round_weight
from ...passes.quantize.quantization_plan import Choice

SMOOTHQUANT, AWQ = "smoothquant", "awq"
_ALPHAS = {SMOOTHQUANT: (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), AWQ: (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)}
# Number of tokens on which the error of a candidate is measured.
_SAMPLE = 256


@dataclass(frozen=True)
class Inputs:
    """Statistics of the inputs of a linear.

    Attributes:
        largest, mean: the largest and the mean magnitude of each channel, [I].
        sample: the inputs at some tokens, evenly spread, [tokens, I].
    """

    largest: Tensor
    mean: Tensor
    sample: Tensor

    @classmethod
    def of(cls, batches: list[Tensor]) -> Inputs:
        """Collect the statistics of batches [tokens, I]."""
        count = sum(len(batch) for batch in batches)
        every = max(1, count // _SAMPLE)
        return cls(
            torch.stack([batch.abs().amax(0) for batch in batches]).amax(0),
            torch.stack([batch.abs().sum(0) for batch in batches]).sum(0) / count,
            torch.cat([batch[::every] for batch in batches]),
        )


@dataclass(frozen=True)
class Found:
    """The best scales of a search.

    Attributes:
        scales: the divisor of each input channel, [I].
        alpha: the exponent that they were computed with.
        error, before: the relative squared error of the output, with and without the scales.
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
    """Return the best scales of a family, or None if no scales are better than none.

    Args:
        weight: the weights of all linears that use the inputs, concatenated, [O, I].
        choice: the grid of the quantized weight.
        family: "smoothquant" or "awq".
        input_block: number of channels of an input that share an int8 scale; 0: all; None: inputs are not quantized.
    """
    expected = inputs.sample @ weight.T
    size = expected.square().sum()
    errors = {}
    best: Found | None = None
    for alpha, scales in _candidates(inputs, weight, family):
        actual = _quantized_inputs(inputs.sample / scales, input_block) @ _quantized(weight * scales, choice).T
        error = float((actual - expected).square().sum() / size)
        errors[alpha] = error
        if alpha and error < min(errors[0.0], best.error if best else torch.inf):
            best = Found(scales, alpha, error, errors[0.0])
    return best


def _candidates(inputs: Inputs, weight: Tensor, family: str) -> Iterator[tuple[float, Tensor]]:
    """Yield (exponent, scales); the first scales are all ones."""
    statistic = inputs.largest if family == SMOOTHQUANT else inputs.mean
    # The scale of a channel that is always zero is arbitrary, but must be positive.
    statistic = statistic.clamp(min=max(1e-5 * float(statistic.max()), 1e-30))
    largest_weight = weight.abs().amax(0)
    largest_weight = largest_weight.clamp(min=max(1e-5 * float(largest_weight.max()), 1e-30))
    for alpha in _ALPHAS[family]:
        scales = statistic**alpha
        if family == SMOOTHQUANT and alpha:
            scales = scales / largest_weight ** (1 - alpha)
        # A factor for all channels changes no code. With this one, inputs grow no larger than they were: they may have
        # to fit into half precision.
        growth = (inputs.largest / scales).max() / inputs.largest.max().clamp(min=1e-30)
        yield alpha, scales * torch.exp2(torch.log2(growth.clamp(min=1e-30)).ceil())


def _quantized(weight: Tensor, choice: Choice) -> Tensor:
    assert choice.grid is not None
    scheme, group_size = choice.grid.scheme, choice.group_size
    codes, scales, *rest = round_weight(weight, scheme, group_size, choice.grid.symmetric)
    zeros, multiples = (part if part.numel() else None for part in rest)
    return dequantize(codes, scales, zeros, scheme, group_size, multiples=multiples)


def _quantized_inputs(inputs: Tensor, block: int | None) -> Tensor:
    if block is None:
        return inputs
    blocks = inputs.unflatten(1, (-1, block or inputs.shape[1]))
    codes, scale = quantize_activation(blocks, "int8")
    return (codes * scale).flatten(1)
