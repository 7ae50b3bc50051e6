"""Block types are decoded by their definition, written here one value at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llmc.compiler.frontend.gguf_blocks import value_dtype, values_of
from llmc.compiler.frontend.gguf_header import SUPPORTED_TYPES

T = GGMLQuantizationType

# Definitions of the block types. Each function returns value i of one block.


def half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibble32(raw: bytes, i: int) -> int:
    """Return value i of 16 bytes that hold values 0..15 in their low halves and 16..31 in their high halves."""
    return raw[i % 16] >> 4 * (i // 16) & 15


def bit(raw: bytes, i: int) -> int:
    return raw[i // 8] >> i % 8 & 1


def six_bit_pair(raw: bytes, k: int) -> tuple[int, int]:
    """Return scale k and minimum k. Eight of each, of six bits, are packed into 12 bytes."""
    if k < 4:
        return raw[k] & 63, raw[k + 4] & 63
    return raw[k + 4] & 15 | raw[k - 4] >> 6 << 4, raw[k + 4] >> 4 | raw[k] >> 6 << 4


def q4_0(b: bytes, i: int) -> float:
    return half(b, 0) * (nibble32(b[2:], i) - 8)


def q4_1(b: bytes, i: int) -> float:
    return half(b, 0) * nibble32(b[4:], i) + half(b, 2)


def q5_0(b: bytes, i: int) -> float:
    return half(b, 0) * ((nibble32(b[6:], i) | bit(b[2:6], i) << 4) - 16)


def q5_1(b: bytes, i: int) -> float:
    return half(b, 0) * (nibble32(b[8:], i) | bit(b[4:8], i) << 4) + half(b, 2)


def q8_0(b: bytes, i: int) -> float:
    return half(b, 0) * signed(b[2 + i])


def q2_k(b: bytes, i: int) -> float:
    scale, q = b[i // 16], b[16 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    return half(b, 80) * (scale & 15) * q - half(b, 82) * (scale >> 4)


def q3_k(b: bytes, i: int) -> float:
    k, scales = i // 16, b[96:108]
    scale = (scales[k % 8] >> 4 * (k // 8) & 15) | (scales[8 + k % 4] >> 2 * (k // 4) & 3) << 4
    q = b[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    return half(b, 108) * (scale - 32) * (q - (0 if b[i % 32] >> i // 32 & 1 else 4))


def q4_k(b: bytes, i: int) -> float:
    scale, minimum = six_bit_pair(b[4:16], i // 32)
    q = b[16 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
    return half(b, 0) * scale * q - half(b, 2) * minimum


def q5_k(b: bytes, i: int) -> float:
    scale, minimum = six_bit_pair(b[4:16], i // 32)
    q = b[48 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15 | (b[16 + i % 32] >> i // 32 & 1) << 4
    return half(b, 0) * scale * q - half(b, 2) * minimum


def q6_k(b: bytes, i: int) -> float:
    n, quarter = i // 128, i % 128 // 32
    low = b[64 * n + 32 * (quarter % 2) + i % 32] >> 4 * (quarter // 2) & 15
    high = b[128 + 32 * n + i % 32] >> 2 * quarter & 3
    return half(b, 208) * signed(b[192 + i // 16]) * ((low | high << 4) - 32)


# The definition of each type, and the byte offsets of its float16 scales in a block.
BLOCKS: dict[T, tuple[Callable[[bytes, int], float], tuple[int, ...]]] = {
    T.Q4_0: (q4_0, (0,)),
    T.Q4_1: (q4_1, (0, 2)),
    T.Q5_0: (q5_0, (0,)),
    T.Q5_1: (q5_1, (0, 2)),
    T.Q8_0: (q8_0, (0,)),
    T.Q2_K: (q2_k, (80, 82)),
    T.Q3_K: (q3_k, (108,)),
    T.Q4_K: (q4_k, (0, 2)),
    T.Q5_K: (q5_k, (0, 2)),
    T.Q6_K: (q6_k, (208,)),
}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_are_dequantized_by_their_definition(kind: T) -> None:
    define, scales = BLOCKS[kind]
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    blocks = rng.integers(0, 256, (12, size), np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = rng.normal(size=(12, 1)).astype(np.float16).view(np.uint8)
    # Chunks of five blocks: the last of twelve blocks is a shorter chunk.
    value = values_of(blocks.reshape(-1), kind, chunk_values=5 * block)
    expected = [define(b.tobytes(), i) for b in blocks for i in range(block)]
    assert value.dtype == value_dtype(kind) == torch.float32
    assert torch.equal(value, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize(("kind", "dtype"), [(T.F32, torch.float32), (T.F16, torch.float16), (T.BF16, torch.bfloat16)])
def test_float_types_keep_their_dtype(kind: T, dtype: torch.dtype) -> None:
    value = torch.randn(15, generator=torch.Generator().manual_seed(0)).to(dtype)
    read = values_of(value.view(torch.uint8).numpy(), kind)
    assert read.dtype == value_dtype(kind) == dtype and torch.equal(read, value)


def test_every_supported_type_is_tested_here() -> None:
    assert set(BLOCKS) | {T.F32, T.F16, T.BF16} == SUPPORTED_TYPES
