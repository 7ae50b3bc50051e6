"""`quant_cached_attention` in plain ONNX: codes and scales are written in place, and what counts of them is expanded.

E4M3 numbers are bytes here: ONNX Runtime moves no float8 on a CPU, neither by Slice nor by TensorScatter.
"""

from __future__ import annotations

import math

import torch

from ....kernels.ops.quantized import CACHE_CODES
from .graph import Value, element
from .lower import Lowering
from .rounded_inputs import row_scale
from .scores import key_positions, ring_slots, weigh, written_round


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
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Value | None,
    slopes: Value | None,
    ring: bool,
) -> tuple[str, ...]:
    """Slots up to the longest row's last are expanded: a call costs what is held, not what there is room for."""
    shared = ("cache", str(k_cache), str(k), str(v), ring)
    if shared not in g.memo:
        kept = _kept_in_ring if ring else _kept
        g.memo[shared] = kept(g, (k_cache, k_scales, k), (v_cache, v_scales, v))
    (keys, values), written = g.memo[shared]
    at = key_positions(g, int(k_cache.shape[2]), ring)
    if not ring:
        at = _held(g, at)
    out = weigh(g, q, keys, values, at, int(k_cache.shape[1]), scale, window, chunk, softcap, sinks, slopes)
    return out, *written


# Codes and scales of keys or of values, and the new ones as they came.
_Kind = tuple[Value, Value, Value]
# Keys and values to look at; both codes and both scales, written.
_Kept = tuple[tuple[str, str], tuple[str, str, str, str]]


def _kept(g: Lowering, *kinds: _Kind) -> _Kept:
    looked_at, codes, scales = [], [], []
    for cache, old_scales, new in kinds:
        new_codes, new_scales = _rounded(g, new, cache.dtype)
        codes.append(g.op("TensorScatter", cache, new_codes, g.starts, axis=2))
        scales.append(g.op("TensorScatter", old_scales, new_scales, g.starts, axis=2))
        looked_at.append(_expanded(g, _held(g, codes[-1]), _held(g, scales[-1]), cache, g.total))
    return (looked_at[0], looked_at[1]), (*codes, *scales)


def _kept_in_ring(g: Lowering, *kinds: _Kind) -> _Kept:
    looked_at, new_codes, new_scales = [], [], []
    for cache, old_scales, new in kinds:
        codes, scales = _rounded(g, new, cache.dtype)
        before = _expanded(g, cache, old_scales, cache, g.constant([int(cache.shape[2])]))
        looked_at.append(g.op("Concat", before, _expanded(g, codes, scales, cache, g.length(new, 2)), axis=2))
        new_codes.append((cache, codes))
        new_scales.append((old_scales, scales))
    slots = ring_slots(g, int(kinds[0][0].shape[2]), *looked_at)
    written = [written_round(g, old, new, slots) for old, new in (*new_codes, *new_scales)]
    return (looked_at[0], looked_at[1]), tuple(written)  # type: ignore[return-value]


def _held(g: Lowering, value: str) -> str:
    """The slots along dim 2 up to the last one that the longest row fills."""
    key = ("held", value)
    if key not in g.memo:
        g.memo[key] = g.op("Slice", value, g.constant([0]), g.total, g.constant([2]))
    return g.memo[key]


def _rounded(g: Lowering, x: Value, codes: torch.dtype) -> tuple[Value, Value]:
    """Rows as codes and a scale for each."""
    wide = g.cast(x, torch.float32)
    if codes == torch.int8:
        scale = row_scale(g, wide, 127.0)
        made = g.op("QuantizeLinear", wide, scale, axis=3, block_size=int(x.shape[3]), output_dtype=element(codes))
        return Value(made, codes, x.shape), scale
    scale = row_scale(g, wide, torch.finfo(codes).max)
    return _e4m3_bytes(g, Value(g.op("Div", wide, scale), torch.float32, x.shape)), scale


def _e4m3_bytes(g: Lowering, x: Value) -> Value:
    """The bytes of the nearest E4M3 numbers, halves to the even one.

    Numbers from 2**(n - 6) on lie 2**(n - 9) apart, those below as those with n = 0, and a byte counts the numbers up
    to its own: eight for each n. A logarithm that is off where n changes names the same number by the other n.
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


def _expanded(g: Lowering, codes: str, scales: str, cache: Value, length: Value) -> str:
    """The numbers behind codes, [B, Hk, length, D]."""
    heads, dim = int(cache.shape[1]), int(cache.shape[3])
    shape = g.sizes([-1, heads, length, dim])
    if cache.dtype == torch.int8:
        # Along the first of two dims: blocks along the last mean the same, ten times as slowly in ONNX Runtime 1.32.
        rows = g.op("Reshape", codes, g.constant([-1, dim]))
        return g.op("Reshape", g.op("DequantizeLinear", rows, g.op("Reshape", scales, g.constant([-1])), axis=0), shape)
    # GatherElements looks an element up in a fifteenth of the time of Gather.
    numbers = torch.arange(256).to(torch.uint8).view(CACHE_CODES["fp8"]).float()
    places = g.op("Cast", g.op("Reshape", codes, g.constant([-1])), to=element(torch.int32))
    found = g.op("Reshape", g.op("GatherElements", g.constant(numbers), places, axis=0), shape)
    return g.op("Mul", found, scales)
