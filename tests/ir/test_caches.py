"""The tensors of a KV cache, in the order of the inputs and outputs of a program."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmc.ir.caches import Cache, CacheInput

CACHE = Cache("k", "v", heads=2, key_dim=4, value_dim=3, length=8, ring=False, window=None, dtype=torch.float16)


def test_a_cache_has_keys_and_values() -> None:
    expected = (CacheInput("k", "key", 4, torch.float16), CacheInput("v", "value", 3, torch.float16))
    assert CACHE.tensors == expected


def test_a_ring_may_be_longer_than_the_window() -> None:
    assert [replace(CACHE, ring=ring, window=window).slack for ring, window in [(True, 8), (True, 5), (False, 5)]] == [
        0,
        3,
        0,
    ]


def test_the_scales_of_codes_follow_in_float32() -> None:
    codes = replace(CACHE, dtype=torch.int8, key_scales="ks", value_scales="vs")
    expected = (
        CacheInput("k", "key", 4, torch.int8),
        CacheInput("v", "value", 3, torch.int8),
        CacheInput("ks", "key_scale", 1, torch.float32),
        CacheInput("vs", "value_scale", 1, torch.float32),
    )
    assert codes.tensors == expected
