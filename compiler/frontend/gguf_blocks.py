"""From a GGUF tensor's bytes to its values."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Values made at a time: the temporaries stay in the cache, at twice the speed of whole rows.
_CHUNK = 1 << 18


def value_dtype(kind: GGMLQuantizationType) -> torch.dtype:
    """What the values of a tensor of type ``kind`` come as: plain types as they are stored, blocks as float32."""
    return _PLAIN.get(kind, torch.float32)


def values_of(raw: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    """The values, in one dimension, that the bytes ``raw`` hold."""
    if kind in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[kind])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    values = np.empty((len(blocks), block), np.float32)
    step = _CHUNK // block
    for start in range(0, len(blocks), step):
        # One long row: the package works through rows in groups of 16, slowly when they are short.
        chunk = blocks[start : start + step].reshape(1, -1)
        values[start : start + step] = dequantize(chunk, kind).reshape(-1, block)
    return torch.from_numpy(values.reshape(-1))
