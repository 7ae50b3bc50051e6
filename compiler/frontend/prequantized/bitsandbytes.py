"""Checkpoints of bitsandbytes: nf4 and fp4 in blocks, and int8 by rows.

weight                   4 bits: bytes in any dtype, the first of two codes in the high nibble, blocks running on
                         from row to row; 8 bits: int8 [O, I]
weight.absmax            float32 [blocks], or uint8 codes of it
weight.quant_map         float32 [16]                  what each code stands for
weight.nested_absmax     float32 [blocks of absmax]    with uint8 absmax, what its codes are multiplied by
weight.nested_quant_map  float32 [256]                 and what they stand for, less the state's nested_offset
weight.quant_state.*     uint8, JSON                   shape and block sizes
SCB                      float32 [O]                   of int8: each row's largest magnitude, which is code 127
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
    """The reader for a `quantization_config`; the tensors say how many bits a linear has."""
    return Format("bitsandbytes", (*_FOUR_BITS, "SCB"), ("weight", "weight_format"), _read)


def _read(parts: Parts) -> Weight:
    in_blocks = any(part in parts for part in _FOUR_BITS) or parts.need("weight").dtype != torch.int8
    return _read_4bit(parts) if in_blocks else _read_int8(parts)


def _read_int8(parts: Parts) -> Weight:
    weight = parts.matrix("weight", (torch.int8,))
    outputs, inputs = weight.shape
    if "weight_format" in parts and (layout := int(parts.need("weight_format", ()).evaluate())) != 0:
        raise parts.mismatch("weight_format", f"the layout {layout} is that of a GPU's kernels, not rows")
    absmax = parts.need("SCB", (outputs,), (torch.float32,))
    return StoredCodes(weight, expression(lambda x: (x / 127).view(outputs, 1), absmax), None, "int8", inputs)


def _read_4bit(parts: Parts) -> Weight:
    state = _state(parts)
    (outputs, inputs), block = state["shape"], state["blocksize"]
    weight = parts.need("weight")
    if inputs % 2 or weight.nbytes * 2 != outputs * inputs:
        raise parts.mismatch("weight", f"it has {weight.nbytes} bytes for {outputs} x {inputs} codes of 4 bits")
    # Groups that lie in one row and in one block, also where blocks don't end with the rows.
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

    reason = f"its codes stand for the numbers of {state['quant_type']}, for which there is no scheme"
    return OnlyNumbers(expression(values, fields(codes, 4), table, scales), reason)


def _state(parts: Parts) -> dict[str, Any]:
    """What the checkpoint says about a weight of 4 bits; small, and read now."""
    part = next((state for state in _STATES if state in parts), _STATES[0])
    raw = bytes(parts.need(part, dtypes=(torch.uint8,)).evaluate().tolist())
    try:
        state = json.loads(raw)
        _, _ = state["shape"]
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if not all(isinstance(n, int) and n > 0 for n in sizes) or not isinstance(state["quant_type"], str):
            raise ValueError(f"it names sizes {sizes}")
        if "nested_blocksize" in state:
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise parts.mismatch(part, f"it is no state of quantization: {error}") from None
    return state


def _absmax(parts: Parts, state: Mapping[str, Any], blocks: int) -> Weight:
    """The scale of each block, which may be rounded itself, in blocks of its own."""
    if "nested_blocksize" not in state:
        return parts.need("weight.absmax", (blocks,), (torch.float32,))
    nested, offset = state["nested_blocksize"], float(state["nested_offset"])
    codes = parts.need("weight.absmax", (blocks,), (torch.uint8,))
    table = parts.need("weight.nested_quant_map", (256,), (torch.float32,))
    scales = repeated(parts.need("weight.nested_absmax", (-(-blocks // nested),), (torch.float32,)), nested, blocks)
    return expression(lambda c, t, s: t.index_select(0, c.int()) * s + offset, codes, table, scales)
