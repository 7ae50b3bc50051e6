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
    multiples: Tensor | None = None,
) -> Tensor:
    """A linear layer whose weight, and perhaps whose input, is rounded; summed wide, rounded once to x's dtype.

    With a rounded input the sums are exact, as an integer kernel's are. Per channel they are then turned
    to float32, multiplied by the weight's scale and by the input's, in this order: an int8 kernel that
    does the same gives the same bits.

    Args:
        weight: codes, by the scheme: see `quantized`.
        scales: [O, I/group_size], or [O, 1] for all groups of a row.
        zeros: zero points, like `scales`, in the weight's code dtype; None: symmetric.
        scheme: "int8", "int4", "fp8" or "nf4".
        group_size: inputs that share a scale; I itself says one scale a channel.
        activation: "none", "int8" or "fp8": the grid on which the input is rounded.
        x_scale: a scalar, the input's scale; without it each row has its own, by its largest magnitude.
        multiples: int8 [O, I/group_size], how many times its row's one scale a group's is: the weight is then
            a matrix of small integers times one scale a row, which integer kernels take as it is.
    """
    if activation == "none" and x_scale is not None:
        raise ValueError("x_scale says how to round the activation, but activation is 'none'")
    wide = widen(x)
    codes, scale = (wide, None) if activation == "none" else round_activation(wide, activation, x_scale)
    # In blocks of rows: the wide numbers of a large head would take many times the memory of its codes.
    rows = max(1, _BLOCK // max(1, x.shape[-1]))
    parts = []
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        zero, multiple = (None if t is None else t[block] for t in (zeros, multiples))
        parts.append(_product(codes, scale, weight[block], scales[block], zero, scheme, group_size, multiple))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


_BLOCK = 1 << 22


def _product(
    codes: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: str,
    group_size: int,
    multiples: Tensor | None,
) -> Tensor:
    """The rows of a quant_linear for a block of its weight; `scale` is that of rounded inputs."""
    if scale is None:
        return codes @ dequantize(weight, scales, zeros, scheme, group_size, codes.dtype, multiples).T
    wide = codes.double()
    if scales.shape[1] == 1:
        whole = decode(weight, zeros, scheme, group_size, torch.float64, multiples).flatten(1)
        return (wide @ whole.T).to(codes.dtype) * scales.to(codes.dtype).flatten() * scale
    grouped = dequantize(weight, scales, zeros, scheme, group_size, torch.float64, multiples)
    return (wide @ grouped.T).to(codes.dtype) * scale
