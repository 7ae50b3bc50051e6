"""Decoding of GGUF tensor bytes: to values, or to the codes and scales of a scheme."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ...kernels.ops.quantized import pack_nibbles

PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
KEPT_SCHEMES = {GGMLQuantizationType.Q8_0: "int8", GGMLQuantizationType.Q4_0: "int4"}
"""The block types whose codes are codes of a symmetric scheme of llmc, with one scale per block."""
CHUNK_VALUES = 1 << 18
"""Values decoded per step. The temporary arrays of a step fit in the CPU cache, which is twice as fast as one step."""
_SCALE_BYTES = 2


def value_dtype(kind: GGMLQuantizationType) -> torch.dtype:
    """Return the dtype of decoded values: the stored one for F32, F16 and BF16, float32 for block types."""
    return PLAIN_DTYPES.get(kind, torch.float32)


def values_of(raw: np.ndarray, kind: GGMLQuantizationType, chunk_values: int = CHUNK_VALUES) -> torch.Tensor:
    """Decode the bytes ``raw`` of a tensor of type ``kind`` to a one-dimensional tensor of values.

    Args:
        raw: the bytes of the whole tensor.
        chunk_values: the number of values that are decoded at a time.
    """
    if kind in PLAIN_DTYPES:
        return torch.from_numpy(raw).view(PLAIN_DTYPES[kind])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    values = np.empty((len(blocks), block), np.float32)
    step = chunk_values // block
    for start in range(0, len(blocks), step):
        # Each chunk is one long array row: the package decodes 16 array rows at a time, which is slow for short ones.
        chunk = blocks[start : start + step].reshape(1, -1)
        values[start : start + step] = dequantize(chunk, kind).reshape(-1, block)
    return torch.from_numpy(values.reshape(-1))


def codes_of(raw: np.ndarray, kind: GGMLQuantizationType, outputs: int) -> torch.Tensor:
    """Return the codes of a matrix with ``outputs`` output channels, packed as the scheme of ``kind`` packs them.

    Args:
        raw: the bytes of the whole tensor.
        kind: Q8_0, for int8 [outputs, inputs]; or Q4_0, for uint8 [outputs, inputs / 2].
        outputs: the number of output channels.
    """
    codes = torch.from_numpy(_blocks(raw, kind)[:, _SCALE_BYTES:])
    if kind == GGMLQuantizationType.Q8_0:
        return codes.reshape(outputs, -1).view(torch.int8)
    # Byte i of a Q4_0 block holds code i in its low half and code i + 16 in its high half.
    return pack_nibbles(torch.cat((codes & 15, codes >> 4), 1)).reshape(outputs, -1)


def scales_of(raw: np.ndarray, kind: GGMLQuantizationType, outputs: int) -> torch.Tensor:
    """Return the scale of each block as float32 [outputs, inputs / 32]; the stored float16 values are exact in it."""
    scales = np.ascontiguousarray(_blocks(raw, kind)[:, :_SCALE_BYTES]).view(np.float16)
    return torch.from_numpy(scales.astype(np.float32)).reshape(outputs, -1)


def _blocks(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    return raw.reshape(-1, GGML_QUANT_SIZES[kind][1])
