"""Reader of bitsandbytes checkpoints.

They are nf4 or fp4 in blocks, or int8 per output channel.

weight                   4 bits: bytes in any dtype, the first of two codes in the high nibble; the weight is flattened,
                         so that a block may span output channels; 8 bits: int8 [O, I]
weight.absmax            float32 [blocks], or uint8 codes of it
weight.quant_map         float32 [16]                  value of each code
weight.nested_absmax     float32 [blocks of absmax]    if absmax is uint8: scale of its codes
weight.nested_quant_map  float32 [256]                 if absmax is uint8: value of each code; the state's
                                                       nested_offset is added after scaling
weight.quant_state.*     uint8, JSON                   shape and block sizes
SCB                      float32 [O]                   int8 only: largest magnitude of each output channel, code 127
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....ir.stored import OnlyNumbers, StoredCodes
from ....ir.weights import Weight
from ....kernels.ops.quantized import NF4
from .layout import expression, fields, raw_bytes, repeated, swapped_nibbles
from .parts import Format, Parts

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_FOUR_BITS = (
    *_STATES, "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
)  # fmt: skip


def open_bitsandbytes(config: Mapping[str, Any]) -> Format:
    """Return the reader for a `quantization_config` of bitsandbytes.

    A linear's tensors show its number of bits.
    """
    return Format("bitsandbytes", (*_FOUR_BITS, "SCB"), ("weight", "weight_format"), _read)


def _read(parts: Parts) -> Weight:
    is_4bit = any(part in parts for part in _FOUR_BITS) or parts.need("weight").dtype != torch.int8
    return _read_4bit(parts) if is_4bit else _read_int8(parts)


def _read_int8(parts: Parts) -> Weight:
    weight = parts.matrix("weight", (torch.int8,))
    outputs, inputs = weight.shape
    if "weight_format" in parts and (layout := int(parts.need("weight_format", ()).evaluate())) != 0:
        raise parts.mismatch("weight_format", f"the layout {layout} is one of GPU kernels; llmc reads layout 0")
    absmax = parts.need("SCB", (outputs,), (torch.float32,))
    return StoredCodes(weight, expression(lambda x: (x / 127).view(outputs, 1), absmax), None, "int8", inputs)


def _read_4bit(parts: Parts) -> Weight:
    state = _state(parts)
    (outputs, inputs), block = state["shape"], state["blocksize"]
    weight = parts.need("weight")
    if inputs % 2 or weight.nbytes * 2 != outputs * inputs:
        raise parts.mismatch("weight", f"it has {weight.nbytes} bytes for {outputs} x {inputs} codes of 4 bits")
    # The largest group that stays within one output channel and one block, even if blocks span output channels.
    size = math.gcd(block, inputs)
    groups = (outputs, inputs // size)
    absmax = repeated(_absmax(parts, state, -(-outputs * inputs // block)), block // size, groups[0] * groups[1])
    scales = expression(lambda x: x.view(groups), absmax)
    flat = raw_bytes(expression(lambda x: x.reshape(-1), weight))
    codes = swapped_nibbles(expression(lambda x: x.view(outputs, inputs // 2), flat))
    table = parts.need("weight.quant_map", (16,), (torch.float32,))
    if torch.equal(table.evaluate(), torch.tensor(NF4)):
        return StoredCodes(codes, scales, None, "nf4", size)

    def values(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
        numbers = table.index_select(0, codes.flatten().int())
        return (numbers.view(*groups, size) * scales.unsqueeze(2)).flatten(1)

    reason = f"its codes are {state['quant_type']}, which is not a scheme of llmc"
    return OnlyNumbers(expression(values, fields(codes, 4), table, scales), reason)


def _state(parts: Parts) -> dict[str, Any]:
    """Read the state of a 4-bit weight: its shape, block sizes and kind.

    It is small, so it is read at once.
    """
    part = next((state for state in _STATES if state in parts), _STATES[0])
    raw = bytes(parts.need(part, dtypes=(torch.uint8,)).evaluate().tolist())
    try:
        state = json.loads(raw)
        _, _ = state["shape"]
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if not all(isinstance(n, int) and n > 0 for n in sizes) or not isinstance(state["quant_type"], str):
            raise ValueError(f"its sizes are {sizes}")
        if "nested_blocksize" in state:
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise parts.mismatch(part, f"it is not a quantization state: {error}") from None
    return state


def _absmax(parts: Parts, state: Mapping[str, Any], blocks: int) -> Weight:
    """Scale of each block, float32 [blocks].

    The checkpoint may store it quantized, in blocks of its own.
    """
    if "nested_blocksize" not in state:
        return parts.need("weight.absmax", (blocks,), (torch.float32,))
    nested, offset = state["nested_blocksize"], float(state["nested_offset"])
    codes = parts.need("weight.absmax", (blocks,), (torch.uint8,))
    table = parts.need("weight.nested_quant_map", (256,), (torch.float32,))
    scales = repeated(parts.need("weight.nested_absmax", (-(-blocks // nested),), (torch.float32,)), nested, blocks)
    return expression(lambda c, t, s: t.index_select(0, c.int()) * s + offset, codes, table, scales)
