"""The program that an 8-bit cache is compared with: no cache, but quantized keys and values."""

from __future__ import annotations

import pytest
import torch
from attending import SCALE, Attending, join, optimized, qkv
from check_pass import inputs
from torch import Tensor

from llmc.compiler.gate.quantized_cache import with_quantized_cache
from llmc.kernels.ops import attention
from llmc.kernels.ops.quantized import CACHE_CODES, dequantize_cached, quantize_cached


def plain(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    return join(attention(*qkv(m, place, x), SCALE, window=5))


@pytest.mark.parametrize("codes", CACHE_CODES)
def test_attentions_use_quantized_keys_and_values(codes: str) -> None:
    def rounded(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = qkv(m, place, x)
        k, v = (dequantize_cached(*quantize_cached(each, CACHE_CODES[codes])) for each in (k, v))
        return join(attention(q, k, v, SCALE, window=5))

    before = optimized(plain)
    text = str(before)
    got = with_quantized_cache(before, codes)(*inputs(2, 11))
    assert torch.equal(got, optimized(rounded)(*inputs(2, 11)))
    assert str(before) == text and not torch.equal(got, before(*inputs(2, 11)))
