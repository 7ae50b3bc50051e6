"""Linear layers with float and with quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen
from .quantized import decode, dequantize, quantize_activation

BLOCK_WEIGHTS = 1 << 22
"""Weights per block: a weight is dequantized in blocks of output channels."""


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, weight [O, I]."""
    return F.linear(x, weight, bias)


@op(fake=lambda x, weight, *_, **__: x.new_empty(*x.shape[:-1], weight.shape[0]))
def quant_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    group_size: int,
    activation: str = "none",
    x_scale: Tensor | None = None,
    multiples: Tensor | None = None,
) -> Tensor:
    """A linear layer with a quantized weight and, optionally, a quantized input.

    The products are summed in the accumulator dtype and rounded once to x's dtype. With a quantized input the
    sums are exact, as in an integer kernel. With one scale per output channel, the sums are converted to
    float32, multiplied by the weight's scale and then by the input's scale. An int8 kernel that uses this order
    returns the same bits.

    Args:
        weight: codes; `quantized` describes the layout of each scheme.
        scales: [O, I/group_size], or [O, 1] for one scale per output channel.
        zeros: zero points, same shape as `scales`, in the dtype of the codes; None: symmetric.
        scheme: "int8", "int4", "fp8", "fp8_e5m2" or "nf4".
        group_size: the number of inputs that share a scale; I: one scale per output channel.
        activation: the scheme of the input: "none", "int8", "fp8" or "fp8_e5m2".
        x_scale: the input's scale, a scalar. None: each token has its own scale, from its largest magnitude.
        multiples: int8 [O, I/group_size], the group's scale as a multiple of its output channel's scale. The
            weight is then a matrix of small integers times one scale per output channel, so integer kernels
            can use it.
    """
    if activation == "none" and x_scale is not None:
        raise ValueError("x_scale is given, but activation is 'none'; set activation, or leave x_scale out")
    wide = widen(x)
    values, x_scales = (wide, None) if activation == "none" else quantize_activation(wide, activation, x_scale)
    # In blocks of output channels: a dequantized LM head would take many times the memory of its codes.
    channels = max(1, BLOCK_WEIGHTS // max(1, x.shape[-1]))
    parts = []
    for start in range(0, weight.shape[0], channels):
        block = slice(start, start + channels)
        zero, multiple = (None if t is None else t[block] for t in (zeros, multiples))
        parts.append(_product(values, x_scales, weight[block], scales[block], zero, scheme, group_size, multiple))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def _product(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: str,
    group_size: int,
    multiples: Tensor | None,
) -> Tensor:
    """Return the output channels of a block of the weight, without bias.

    Args:
        x: the input; its codes if it is quantized.
        x_scales: the scales of a quantized input; None: it is not quantized.
    """
    if x_scales is None:
        return x @ dequantize(weight, scales, zeros, scheme, group_size, x.dtype, multiples).T
    wide = x.double()
    if scales.shape[1] == 1:
        integers = decode(weight, zeros, scheme, group_size, torch.float64, multiples).flatten(1)
        return (wide @ integers.T).to(x.dtype) * scales.to(x.dtype).flatten() * x_scales
    dequantized = dequantize(weight, scales, zeros, scheme, group_size, torch.float64, multiples)
    return (wide @ dequantized.T).to(x.dtype) * x_scales
