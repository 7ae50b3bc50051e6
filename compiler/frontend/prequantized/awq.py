"""Reader of AWQ checkpoints in AutoAWQ's `gemm` layout.

qweight   int32 [I, O/8]         codes of 8 consecutive output channels in one word, even channels before odd ones
qzeros    int32 [groups, O/8]    zero points in the same order
scales    float [groups, O]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....ir.weights import Weight, constant, transpose
from .groups import from_groups
from .layout import expression, fields, packed_nibbles, raw_bytes, wide
from .parts import FLOATS, Format, Parts, entry, group_of, unreadable

# Index of each output channel's field in a word.
_PLACES = constant(torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]), "awq_places")


def open_awq(config: Mapping[str, Any]) -> Format:
    """Return the reader for a `quantization_config` of awq."""
    bits = entry(config, "bits", 4, int)
    if bits != 4:
        raise unreadable(f"The checkpoint is quantized with awq to {bits} bits; llmc reads 4 bits.")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise unreadable(f"The checkpoint's awq codes use the layout {version!r}; llmc reads gemm.")
    group_size = group_of(config)
    return Format("awq", ("qweight", "qzeros"), ("scales",), lambda parts: _read(parts, group_size))


def _read(parts: Parts, group_size: int) -> Weight:
    qweight = parts.matrix("qweight", (torch.int32,))
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
    if inputs % 2:
        raise parts.mismatch("qweight", f"it has {inputs} input channels, an odd number")
    group_size = inputs if group_size == -1 else group_size
    groups = -(-inputs // group_size)
    scales = parts.need("scales", (groups, outputs), FLOATS)
    qzeros = parts.need("qzeros", (groups, outputs // 8), (torch.int32,))
    codes, zeros = packed_nibbles(_by_output(qweight)), _by_output(qzeros)
    return from_groups(parts, codes, transpose(wide(scales)), zeros, "int4", group_size)


def _by_output(words: Weight) -> Weight:
    """Unpack words [N, O/8] to uint8 [O, N], in the order of the output channels."""
    inputs, words_per_input = words.shape

    def sort(nibbles: Tensor, places: Tensor) -> Tensor:
        return nibbles.view(inputs, words_per_input, 8).index_select(2, places).view(inputs, words_per_input * 8)

    return transpose(expression(sort, fields(raw_bytes(words), 4), _PLACES))
