"""Reader of GPTQ checkpoints as AutoGPTQ and GPTQModel write them.

    qweight   int32 [I * bits/32, O]        codes of consecutive input channels in one word, lowest bits first
    qzeros    int32 [groups, O * bits/32]   zero points of consecutive output channels, packed the same way
    scales    float [groups, O]
    g_idx     int32 [I]                     the group of each input channel

Version 1 of the format stores each zero point minus one. As GPTQModel does, the reader adds one to all fields of a
word with a single addition that carries between fields. This is exact: a zero point of 0 was stored with a borrow
from the next field, and the carry undoes the borrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....ir.weights import Weight, transpose
from .groups import from_groups
from .layout import expression, fields, packed_nibbles, raw_bytes, signed, wide
from .parts import FLOATS, Format, Parts, entry, group_of, unreadable

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def open_gptq(config: Mapping[str, Any]) -> Format:
    """Return the reader for a `quantization_config` of gptq."""
    bits: int = entry(config, "bits", None, int)
    if bits not in _ONES:
        raise unreadable(f"The checkpoint is quantized with gptq to {bits} bits; llmc reads 2, 4 and 8 bits.")
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in _VERSIONS:
        raise unreadable(f"The checkpoint's gptq codes have the format {version!r}; llmc reads gptq and gptq_v2.")
    # A rule that starts with "-:" excludes modules from quantization. Their tensors show that already.
    if rules := [rule for rule in config.get("dynamic") or {} if not rule.startswith("-:")]:
        raise unreadable(f"The checkpoint's gptq settings differ between layers (dynamic rule {rules[0]!r}).")
    group_size = group_of(config)

    def read(parts: Parts) -> Weight:
        return _read(parts, bits, group_size, _VERSIONS[version])

    return Format("gptq", ("qweight", "qzeros", "g_idx"), ("scales",), read)


def _read(parts: Parts, bits: int, group_size: int, version: int) -> Weight:
    qweight = parts.matrix("qweight", (torch.int32,))
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    group_size = inputs if group_size == -1 else group_size
    groups = -(-inputs // group_size)
    scales = parts.need("scales", (groups, outputs), FLOATS)
    qzeros: Weight = parts.need("qzeros", (groups, -(-outputs * bits // 32)), (torch.int32,))
    if version == 1:
        qzeros = expression(lambda words: words + _ONES[bits], qzeros)
    zeros = transpose(expression(lambda x: x[:, :outputs], fields(raw_bytes(qzeros), bits)))
    codes = raw_bytes(transpose(qweight))  # for 4 bits, this is llmc's own packing
    scheme = "int4"
    if bits == 2:
        codes = packed_nibbles(fields(codes, bits))
    elif bits == 8:
        codes, zeros, scheme = signed(codes), signed(zeros), "int8"
    return from_groups(parts, codes, transpose(wide(scales)), zeros, scheme, group_size, order="g_idx")
