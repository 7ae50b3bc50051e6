"""Rounded numbers: how codes are packed, what they stand for, and how activations are rounded.

A weight is rounded by one of these schemes, in groups of consecutive inputs that share a scale:

    int8   int8 [O, I]        (code - zero) * scale, zero 0 when symmetric
    int4   uint8 [O, I/2]     (code - zero) * scale, codes 0..15, zero 8 when symmetric; low nibble first
    fp8    float8_e4m3fn [O, I]   code * scale; fp8_e5m2 alike
    nf4    uint8 [O, I/2]     NF4[code] * scale; low nibble first

Keys and values that a cache keeps in 8 bits are rounded row by row, as activations are: int8 codes -127..127 or E4M3.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SCHEMES = ("int8", "int4", "nf4", *FLOAT8)
ACTIVATIONS = ("none", "int8", *FLOAT8)

# Quantiles of the normal distribution, scaled to -1..1, with zero among them (QLoRA, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Below every number that matters and above 57344 times the smallest float32: the scale of a row of zeros.
SMALLEST_ABSMAX = 2.0**-100

# What a cache keeps codes of keys and values as.
CACHE_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 [..., I] in bytes [..., I/2]: the even one is the low nibble."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes [..., I/2] as uint8 codes 0..15 [..., I]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def decode(
    weight: Tensor,
    zeros: Tensor | None,
    scheme: str,
    group_size: int,
    dtype: torch.dtype,
    multiples: Tensor | None = None,
) -> Tensor:
    """The numbers that the codes stand for before their scale, [O, I/group_size, group_size].

    For int8 and int4 they are integers, zero point taken off and multiplied by their group's multiple.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    if zeros is not None and scheme not in ("int8", "int4"):
        raise ValueError(f"scheme {scheme!r} has no zero points")
    codes = unpack_nibbles(weight) if scheme in ("int4", "nf4") else weight
    values = levels_of(
        codes.unflatten(1, (-1, group_size)), None if zeros is None else zeros.unsqueeze(2), scheme, dtype
    )
    return values if multiples is None else values * multiples.to(dtype).unsqueeze(2)


def levels_of(codes: Tensor, zeros: Tensor | None, scheme: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What unpacked codes stand for, in units of their group's spacing; `zeros` broadcasts with them."""
    if scheme == "nf4":
        return torch.tensor(NF4, dtype=dtype, device=codes.device)[codes.int()]
    levels = codes.to(dtype)
    if zeros is not None:
        return levels - zeros.to(dtype)
    return levels - 8 if scheme == "int4" else levels


def dequantize(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: str,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    multiples: Tensor | None = None,
) -> Tensor:
    """The weight [O, I] that codes, scales, zero points and multiples stand for."""
    values = decode(weight, zeros, scheme, group_size, dtype, multiples)
    return values.mul_(scales.to(dtype).unsqueeze(2)).flatten(1)


def round_activation(x: Tensor, activation: str, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round to the grid of "int8", "fp8" or "fp8_e5m2": `(codes, scale)`, both in x's dtype.

    Without `x_scale` each row's largest magnitude becomes the largest code. Halves go to the even code,
    what lies beyond the grid to its end.
    """
    if activation not in ACTIVATIONS[1:]:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    largest = 127.0 if activation == "int8" else torch.finfo(FLOAT8[activation]).max
    if x_scale is None:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ABSMAX) / largest
    else:
        scale = x_scale.to(x.dtype)
    if activation == "int8":
        return torch.round(x / scale).clamp(-128.0, 127.0), scale
    # Clamped here, because whether the cast itself saturates depends on the version of torch.
    return (x / scale).clamp(-largest, largest).to(FLOAT8[activation]).to(x.dtype), scale


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [..., D] as a cache keeps them: codes of one of `CACHE_CODES`, and their scales, float32 [..., 1]."""
    (scheme,) = (name for name, codes in CACHE_CODES.items() if codes == dtype)
    codes, scales = round_activation(x.float(), scheme)
    return codes.to(dtype), scales


def rows_of(codes: Tensor, scales: Tensor) -> Tensor:
    """The rows that codes and scales stand for, float32."""
    return codes.to(scales.dtype) * scales


def nonzero(scales: Tensor) -> Tensor:
    """A row of zeros has any scale but zero."""
    return torch.where(scales > 0, scales, 1.0)
