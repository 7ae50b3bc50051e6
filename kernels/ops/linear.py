"""Linear layers, plain and over rounded weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen
from .quantized import decode, dequantize, round_activation


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
) -> Tensor:
    """A linear layer whose weight, and perhaps whose input, is rounded; summed wide, rounded once to x's dtype.

    With a rounded input the sums are exact, as an integer kernel's are. Per channel they are then turned
    to float32, multiplied by the weight's scale and by the input's, in this order: an int8 kernel that
    does the same gives the same bits.

    Args:
        weight: codes, by the scheme: see `quantized`.
        scales: [O, I/group_size].
        zeros: zero points, like `scales`, in the weight's code dtype; None: symmetric.
        scheme: "int8", "int4", "fp8" or "nf4".
        group_size: inputs that share a scale; I itself says one scale a channel.
        activation: "none", "int8" or "fp8": the grid on which the input is rounded.
        x_scale: a scalar, the input's scale; without it each row has its own, by its largest magnitude.
    """
    wide = widen(x)
    if activation == "none":
        if x_scale is not None:
            raise ValueError("x_scale says how to round the activation, but activation is 'none'")
        y = wide @ dequantize(weight, scales, zeros, scheme, group_size, wide.dtype).T
    else:
        codes, scale = round_activation(wide, activation, x_scale)
        codes = codes.double()
        if scales.shape[1] == 1:
            whole = decode(weight, zeros, scheme, group_size, torch.float64).flatten(1)
            y = (codes @ whole.T).to(wide.dtype) * scales.to(wide.dtype).flatten() * scale
        else:
            grouped = dequantize(weight, scales, zeros, scheme, group_size, torch.float64)
            y = (codes @ grouped.T).to(wide.dtype) * scale
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)
