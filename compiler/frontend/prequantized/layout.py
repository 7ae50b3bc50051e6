"""How codes of other layouts become llmc's: expressions that are computed when they are read.

Each reads its argument once, for a lazy weight that stands twice in an expression is read twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....ir.weights import Weight, constant, record, recorded

_SHIFTS = {bits: constant(torch.arange(0, 8, bits, dtype=torch.uint8), f"shifts_{bits}") for bits in (2, 4)}
_PLACES = constant(torch.tensor([1, 16], dtype=torch.uint8), "places")


def expression(compute: Callable[..., Tensor], *weights: Weight) -> Weight:
    """What torch code makes of the weights, when it is asked for."""
    return recorded(compute(*(record(weight) for weight in weights)))


def fields(raw: Weight, bits: int) -> Weight:
    """Each field of `bits` bits of the bytes [..., n] as one of uint8 [..., n * 8 / bits], the lowest first."""
    if bits == 8:
        return raw
    mask = (1 << bits) - 1
    return expression(lambda x, shifts: ((x.unsqueeze(-1) >> shifts) & mask).flatten(-2), raw, _SHIFTS[bits])


def raw_bytes(words: Weight) -> Weight:
    """The bytes of a tensor, in its last dim."""
    return words if words.dtype == torch.uint8 else expression(lambda x: x.view(torch.uint8), words)


def packed_nibbles(codes: Weight) -> Weight:
    """Codes uint8 0..15 [O, I] as llmc packs them, [O, I/2]; read once, where `pack_nibbles` would read twice."""
    outputs, inputs = codes.shape

    def pack(x: Tensor, places: Tensor) -> Tensor:
        return (x.view(outputs, inputs // 2, 2) * places).sum(-1, dtype=torch.uint8)

    return expression(pack, codes, _PLACES)


def swapped_nibbles(raw: Weight) -> Weight:
    """Bytes whose low and high half have changed places."""
    return expression(lambda x: ((x.int() * 257 >> 4) & 255).to(torch.uint8), raw)


def signed(codes: Weight) -> Weight:
    """Codes 0..255 as int8, 128 less."""
    return expression(lambda x: (x ^ 128).view(torch.int8), codes)


def wide(scales: Weight) -> Weight:
    """Scales in float32, whose values are those of every dtype that they are stored in."""
    return scales if scales.dtype == torch.float32 else expression(lambda x: x.float(), scales)


def repeated(weight: Weight, times: int, length: int) -> Weight:
    """Each entry of the last dim so many times, and of that the first `length`."""
    if times == 1 and length == weight.shape[-1]:
        return weight
    lead = weight.shape[:-1]
    return expression(lambda x: x.unsqueeze(-1).expand(*x.shape, times).reshape(*lead, -1)[..., :length], weight)
