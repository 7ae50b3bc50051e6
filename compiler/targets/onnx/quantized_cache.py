"""Attention over quantized keys and values in plain ONNX.

Codes and scales are written in place, and the filled part of the cache is dequantized for the Attention op.
E4M3 codes are bytes here, because ONNX Runtime has neither Slice nor TensorScatter of float8 on CPUs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ....kernels.ops.quantized import CACHE_CODES
from .graph import Value, element
from .lower import Lowering, WeightValue
from .quantized_inputs import token_scale
from .scores import key_positions, ring_slots, weigh, written_to_ring


def attend(
    g: Lowering,
    q: Value,
    k: Value,
    v: Value,
    k_cache: Value,
    v_cache: Value,
    k_scales: Value,
    v_scales: Value,
    starts: Value,
    ring: bool,
    **weighing: Any,
) -> tuple[str, ...]:
    """Attend to the filled part of the cache, dequantized.

    The cost of a call depends on the length of the longest sequence and not on the size of the cache.

    Args:
        weighing: the arguments of `weigh` from `scale` on.
    """
    shared = ("cache", str(k_cache), str(k), str(v), ring)
    if shared not in g.memo:
        update = _update_ring if ring else _update
        g.memo[shared] = update(g, (k_cache, k_scales, k), (v_cache, v_scales, v))
    (keys, values), written = g.memo[shared]
    positions = key_positions(g, int(k_cache.shape[2]), ring)
    if not ring:
        positions = _filled(g, positions)
    out = weigh(g, q, keys, values, positions, int(k_cache.shape[1]), **weighing)
    return out, *written


def attend_by_channel(
    g: Lowering,
    q: Value,
    k: Value,
    v: Value,
    k_cache: Value,
    v_cache: Value,
    starts: Value,
    k_scales: WeightValue,
    v_scales: WeightValue,
    **weighing: Any,
) -> tuple[str, str, str]:
    """Attend to the filled part of a cache whose codes have constant scales.

    A code is not multiplied by the scale of its channel. Each query is multiplied by the scales of the keys, and each
    output by those of the values: it is the same, and there are fewer of them.

    Args:
        weighing: the arguments of `weigh` from `scale` on.
    """
    shared = ("cache", str(k_cache), str(k), str(v))
    if shared not in g.memo:
        pairs = (k_cache, _codes(g, k, k_scales)), (v_cache, _codes(g, v, v_scales))
        written = [g.op("TensorScatter", cache, new, g.starts, axis=2) for cache, new in pairs]
        g.memo[shared] = *written, *(g.cast(_filled(g, codes), torch.float32) for codes in written)
    keys, values, attended_keys, attended_values = g.memo[shared]
    heads = int(q.shape[1])
    queries = Value(g.op("Mul", q, _by_head(g, k_scales, heads)), torch.float32, q.shape)
    at = _filled(g, key_positions(g, int(k_cache.shape[2]), ring=False))
    out = weigh(g, queries, attended_keys, attended_values, at, int(k_cache.shape[1]), **weighing)
    return g.op("Mul", out, _by_head(g, v_scales, heads)), keys, values


def _codes(g: Lowering, x: Value, scales: WeightValue) -> str:
    """Quantize keys or values to int8 by channel."""
    units = g.op("Div", x, _by_head(g, scales, int(x.shape[1])))
    return g.op("QuantizeLinear", units, g.constant(1.0, torch.float32), g.constant(0, torch.int8))


def _by_head(g: Lowering, scales: WeightValue, heads: int) -> Value:
    """Return scales of kv heads for all heads, [heads, 1, D]."""
    values = scales.weight.evaluate()
    return g.constant(values.repeat_interleave(heads // values.shape[0], 0).unsqueeze(1))


# Cached codes, cached scales and new tokens, of keys or of values.
_Part = tuple[Value, Value, Value]
# Keys and values to attend to; updated codes of keys and values, and updated scales.
_Updated = tuple[tuple[str, str], tuple[str, str, str, str]]


def _update(g: Lowering, *parts: _Part) -> _Updated:
    attended, codes, scales = [], [], []
    for cache, old_scales, new in parts:
        new_codes, new_scales = _quantized(g, new, cache.dtype)
        codes.append(g.op("TensorScatter", cache, new_codes, g.starts, axis=2))
        scales.append(g.op("TensorScatter", old_scales, new_scales, g.starts, axis=2))
        attended.append(dequantized(g, _filled(g, codes[-1]), _filled(g, scales[-1]), cache, g.total))
    return (attended[0], attended[1]), (*codes, *scales)


def _update_ring(g: Lowering, *parts: _Part) -> _Updated:
    attended, new_codes, new_scales = [], [], []
    for cache, old_scales, new in parts:
        codes, scales = _quantized(g, new, cache.dtype)
        old = dequantized(g, cache, old_scales, cache, g.constant([int(cache.shape[2])]))
        attended.append(g.op("Concat", old, dequantized(g, codes, scales, cache, g.length(new, 2)), axis=2))
        new_codes.append((cache, codes))
        new_scales.append((old_scales, scales))
    slots = ring_slots(g, int(parts[0][0].shape[2]), *attended)
    written = [written_to_ring(g, old, new, slots) for old, new in (*new_codes, *new_scales)]
    return (attended[0], attended[1]), tuple(written)  # type: ignore[return-value]


def _filled(g: Lowering, value: str) -> str:
    """Slice dimension 2 to the length of the longest sequence."""
    key = ("held", value)
    if key not in g.memo:
        g.memo[key] = g.op("Slice", value, g.constant([0]), g.total, g.constant([2]))
    return g.memo[key]


def _quantized(g: Lowering, x: Value, dtype: torch.dtype) -> tuple[Value, Value]:
    """Return codes of `dtype` and a scale per token and head."""
    wide = g.cast(x, torch.float32)
    if dtype == torch.int8:
        scale = token_scale(g, wide, 127.0)
        codes = g.op("QuantizeLinear", wide, scale, axis=3, block_size=int(x.shape[3]), output_dtype=element(dtype))
        return Value(codes, dtype, x.shape), scale
    scale = token_scale(g, wide, torch.finfo(dtype).max)
    return e4m3_bytes(g, Value(g.op("Div", wide, scale), torch.float32, x.shape)), scale


def e4m3_bytes(g: Lowering, x: Value) -> Value:
    """Return the bytes of the nearest E4M3 numbers; ties round to even.

    For n >= 0, E4M3 numbers between 2**(n - 6) and 2**(n - 5) have the spacing 2**(n - 9); below 2**-6 it is that of
    n = 0. The byte of a positive x is 8 n + x / 2**(n - 9). At the boundaries, n and n - 1 give the same byte, so a
    rounding error of the logarithm does no harm.
    """

    def constant(value: float) -> Value:
        return g.constant(value, torch.float32)

    size = g.op("Abs", x)
    power = g.op("Floor", g.op("Mul", g.op("Log", size), constant(1 / math.log(2))))
    n = g.op("Max", g.op("Add", power, constant(6.0)), constant(0.0))
    spacing = g.op("BitShift", g.constant(1, torch.uint32), g.op("Cast", n, to=element(torch.uint32)), direction="LEFT")
    steps = g.op("Round", g.op("Div", g.op("Mul", size, constant(2.0**9)), g.op("Cast", spacing, to=element(x.dtype))))
    positive = g.op("Add", g.op("Mul", n, constant(8.0)), steps)
    signed = g.op("Where", g.op("Less", x, constant(0.0)), g.op("Add", positive, constant(128.0)), positive)
    return Value(g.op("Cast", signed, to=element(torch.uint8)), torch.uint8, x.shape)


def dequantized(g: Lowering, codes: str, scales: str, cache: Value, length: Value) -> str:
    """Dequantize the codes of `length` tokens: keys or values [B, Hk, length, D].

    Args:
        cache: the cache that has the codes; its shape and dtype are used, but not its content.
    """
    heads, dim = int(cache.shape[1]), int(cache.shape[3])
    shape = g.sizes([-1, heads, length, dim])
    if cache.dtype == torch.int8:
        # A scale per vector of a 2-D tensor. Blocks along the last axis mean the same, but are ten times as slow in
        # ONNX Runtime 1.32.
        vectors = g.op("Reshape", codes, g.constant([-1, dim]))
        flat_scales = g.op("Reshape", scales, g.constant([-1]))
        return g.op("Reshape", g.op("DequantizeLinear", vectors, flat_scales, axis=0), shape)
    # GatherElements is fifteen times as fast as Gather for single elements.
    table = torch.arange(256).to(torch.uint8).view(CACHE_CODES["fp8"]).float()
    indices = g.op("Cast", g.op("Reshape", codes, g.constant([-1])), to=element(torch.int32))
    values = g.op("Reshape", g.op("GatherElements", g.constant(table), indices, axis=0), shape)
    return g.op("Mul", values, scales)
