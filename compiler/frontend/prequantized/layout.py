"""Weight expressions that convert codes of other layouts to llmc's layout.

Each uses its argument once, because a lazy weight that occurs twice in an expression is read twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....ir.weights import Weight, constant, record, recorded

_SHIFTS = {bits: constant(torch.arange(0, 8, bits, dtype=torch.uint8), f"shifts_{bits}") for bits in (2, 4)}
_PLACES = constant(torch.tensor([1, 16], dtype=torch.uint8), "places")


def expression(compute: Callable[..., Tensor], *weights: Weight) -> Weight:
    """Build the weight expression of torch code applied to weights."""
    return recorded(compute(*(record(weight) for weight in weights)))


def fields(raw: Weight, bits: int) -> Weight:
    """Unpack bytes [..., n] into fields of `bits` bits, lowest bits first.

    The result is uint8 [..., n * 8 / bits].
    """
    if bits == 8:
        return raw
    mask = (1 << bits) - 1
    return expression(lambda x, shifts: ((x.unsqueeze(-1) >> shifts) & mask).flatten(-2), raw, _SHIFTS[bits])


def raw_bytes(words: Weight) -> Weight:
    """View a tensor as uint8.

    The bytes of one element are consecutive in the last dim.
    """
    return words if words.dtype == torch.uint8 else expression(lambda x: x.view(torch.uint8), words)


def packed_nibbles(codes: Weight) -> Weight:
    """Pack codes uint8 0..15 [O, I] to [O, I/2] as llmc does.

    Unlike `pack_nibbles`, this uses `codes` once.
    """
    outputs, inputs = codes.shape

    def pack(x: Tensor, places: Tensor) -> Tensor:
        return (x.view(outputs, inputs // 2, 2) * places).sum(-1, dtype=torch.uint8)

    return expression(pack, codes, _PLACES)


def swapped_nibbles(raw: Weight) -> Weight:
    """Exchange the low and high nibble of each byte."""
    return expression(lambda x: ((x.int() * 257 >> 4) & 255).to(torch.uint8), raw)


def signed(codes: Weight) -> Weight:
    """Convert unsigned codes 0..255 to int8 by subtracting 128."""
    return expression(lambda x: (x ^ 128).view(torch.int8), codes)


def wide(scales: Weight) -> Weight:
    """Convert scales to float32, which represents every stored dtype exactly."""
    return scales if scales.dtype == torch.float32 else expression(lambda x: x.float(), scales)


def repeated(weight: Weight, times: int, length: int) -> Weight:
    """Repeat each entry of the last dim `times` times.

    Then keep the first `length` entries.
    """
    if times == 1 and length == weight.shape[-1]:
        return weight
    lead = weight.shape[:-1]
    return expression(lambda x: x.unsqueeze(-1).expand(*x.shape, times).reshape(*lead, -1)[..., :length], weight)
