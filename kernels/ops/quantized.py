"""Pack and decode codes of weights, and quantize activations.

The schemes of a weight [O, I]. Groups of consecutive input channels share a scale:

    int8      int8 [O, I]            (code - zero) * scale; symmetric: zero is 0
    int4      uint8 [O, I/2]         (code - zero) * scale, codes 0..15; symmetric: zero is 8; low nibble first
    fp8       float8_e4m3fn [O, I]   code * scale
    fp8_e5m2  float8_e5m2 [O, I]     code * scale
    nf4       uint8 [O, I/2]         NF4[code] * scale; low nibble first

Keys and values in an 8-bit cache are quantized in one of two ways. Per token and head, as activations are: int8 codes
-127..127, or E4M3. Or with a constant scale per channel: int8 codes -128..127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import ACTIVATIONS, SCHEMES

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

# Quantiles of the normal distribution scaled to -1..1, zero included (QLoRA, appendix E).
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

# Lower bound of the largest magnitude of a vector, so that zeros have a scale: smaller than any activation that
# matters, and more than 57344 (the largest E5M2) times the smallest float32.
SMALLEST_ABSMAX = 2.0**-100

# The dtype of the codes in a quantized KV cache.
CACHE_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes 0..15 [..., I] into bytes [..., I/2]; low nibbles come first."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack bytes [..., I/2] into uint8 codes 0..15 [..., I]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def decode(
    weight: Tensor,
    zeros: Tensor | None,
    scheme: str,
    group_size: int,
    dtype: torch.dtype,
    multiples: Tensor | None = None,
) -> Tensor:
    """Return the values of the codes before scaling, [O, I/group_size, group_size].

    For int8 and int4 these are integers: the code minus its zero point, times the multiple of its group.
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
    """Return the values of unpacked codes, in units of the group's scale.

    `zeros` must broadcast with `codes`.
    """
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
    """Return the weight [O, I] of codes, scales, zero points and multiples."""
    values = decode(weight, zeros, scheme, group_size, dtype, multiples)
    return values.mul_(scales.to(dtype).unsqueeze(2)).flatten(1)


def quantize_activation(x: Tensor, activation: str, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x to "int8", "fp8" or "fp8_e5m2".

    Returns `(codes, scale)`, both in x's dtype. Without `x_scale`, each vector along the last dimension has its own
    scale, which maps its largest magnitude to the largest code. Ties round to the even code. Values beyond the
    largest code saturate.
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
    # Clamp first: whether the cast saturates depends on the version of torch.
    return (x / scale).clamp(-largest, largest).to(FLOAT8[activation]).to(x.dtype), scale


def quantize_cached(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize keys or values [..., D] for a cache.

    Returns codes and their scales, float32 [..., 1].

    Args:
        dtype: the dtype of the codes, one of the values of `CACHE_CODES`.
    """
    (scheme,) = (name for name, codes in CACHE_CODES.items() if codes == dtype)
    codes, scales = quantize_activation(x.float(), scheme)
    return codes.to(dtype), scales


def dequantize_cached(codes: Tensor, scales: Tensor) -> Tensor:
    """Dequantize keys or values of a cache to float32."""
    return codes.to(scales.dtype) * scales


def quantize_by_channel(x: Tensor, scales: Tensor) -> Tensor:
    """Quantize keys or values [B, Hk, S, D] for a cache with constant scales [Hk, D]; return int8 codes.

    Ties round to the even code. Values beyond the largest code saturate.
    """
    return torch.round(x.float() / scales.unsqueeze(1)).clamp(-128.0, 127.0).to(torch.int8)


def dequantize_by_channel(codes: Tensor, scales: Tensor) -> Tensor:
    """Dequantize codes [B, Hk, S, D] with scales [Hk, D] to float32."""
    return codes.to(scales.dtype) * scales.unsqueeze(1)


def nonzero(scales: Tensor) -> Tensor:
    """Replace the zero scales of groups of zeros by 1, to avoid dividing by zero."""
    return torch.where(scales > 0, scales, 1.0)
