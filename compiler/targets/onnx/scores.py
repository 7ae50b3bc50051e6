"""`cached_attention` in plain ONNX: writes the cache in place and computes masks."""

from __future__ import annotations

from typing import Any

import torch

from .graph import Value
from .lower import Lowering


def attend(
    g: Lowering,
    q: Value,
    k: Value,
    v: Value,
    k_cache: Value,
    v_cache: Value,
    starts: Value,
    ring: bool,
    **weighing: Any,
) -> tuple[str, str, str]:
    """Write new tokens to the cache and attend to all of it.

    With a ring, attend to the old cache and the new tokens, and write afterwards: a new token may overwrite a position
    that an earlier new token still sees.

    Args:
        weighing: the arguments of `weigh` from `scale` on.
    """
    shared = ("cache", str(k_cache), str(k), str(v), ring)
    if shared not in g.memo:
        g.memo[shared] = _update(g, k, v, k_cache, v_cache, ring)
    keys, values, all_keys, all_values = g.memo[shared]
    positions = key_positions(g, int(k_cache.shape[2]), ring)
    kv_heads = int(k_cache.shape[1])
    out = weigh(g, q, all_keys, all_values, positions, kv_heads, **weighing)
    return out, keys, values


def weigh(
    g: Lowering,
    q: Value,
    keys: str,
    values: str,
    at: str,
    kv_heads: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Value | None,
    slopes: Value | None,
    is_composed: bool = False,
) -> str:
    """Weigh the values by the softmax of the scores.

    Args:
        at: the position of each key, from `key_positions`.
        is_composed: write it in basic ops; without it, only what ONNX's Attention lacks is.
    """
    mask = _mask(g, at, window, chunk)
    is_composed = is_composed or sinks is not None
    if slopes is not None or is_composed:
        mask = _bias(g, mask, q.dtype)
    if slopes is not None:
        mask = g.op("Add", mask, _alibi(g, at, slopes, q.dtype))
    if is_composed:
        return _composed(g, q, keys, values, kv_heads, mask, scale, softcap, sinks)
    # ONNX's Attention applies softcap before the mask, as the meaning of the op does.
    return g.op("Attention", q, keys, values, mask, scale=scale, softcap=softcap)


def _update(g: Lowering, k: Value, v: Value, k_cache: Value, v_cache: Value, ring: bool) -> tuple[str, str, str, str]:
    """Return the updated caches, and the keys and values to attend to.

    Call it once for all attentions of the same keys and values: a second one would read a cache that is already
    overwritten.
    """
    pairs = (k_cache, k), (v_cache, v)
    if not ring:
        keys, values = (g.op("TensorScatter", old, new, g.starts, axis=2) for old, new in pairs)
        return keys, values, keys, values
    all_keys, all_values = (g.op("Concat", old, new, axis=2) for old, new in pairs)
    slots = ring_slots(g, int(k_cache.shape[2]), all_keys, all_values)
    keys, values = (written_to_ring(g, old, new, slots) for old, new in pairs)
    return keys, values, all_keys, all_values


def ring_slots(g: Lowering, size: int, all_keys: str, all_values: str) -> str:
    """Return the index in the ring of each sequence's first new token, [B].

    The ring is written in the memory that it is read from, so it must be read first. To enforce this order, the result
    depends on `all_keys` and `all_values`: it includes the difference of their batch sizes, which is zero.
    """
    key = ("ring", size)
    if key not in g.memo:
        # If there are more new tokens than the ring holds, only the last ones are written.
        length = g.op("Shape", "input_ids", start=1, end=2)
        dropped = g.op("Max", g.op("Sub", length, g.constant([size])), g.constant([0]))
        g.memo[key] = g.op("Mod", g.op("Add", g.starts, dropped), g.constant([size]))
    batches = [g.op("Shape", x, start=0, end=1) for x in (all_keys, all_values)]
    return g.op("Add", g.memo[key], g.op("Sub", *batches))


def written_to_ring(g: Lowering, cache: Value, new: Value, slots: str) -> str:
    """Write the new tokens to a ring; if there are more than it holds, the last ones."""
    size = int(cache.shape[2])
    # If there are fewer than `size` tokens, the slice returns all.
    last = g.op("Slice", new, g.constant([-size]), g.constant([2**31]), g.constant([2]))
    return g.op("TensorScatter", cache, last, slots, axis=2, mode="circular")


def key_positions(g: Lowering, size: int, ring: bool) -> str:
    """Return the position of each key, [B, 1, T] or [1, 1, T].

    Positions of empty entries are negative or after all queries.
    """
    key = ("keys", size, ring)
    if key not in g.memo:
        indices = g.constant(torch.arange(size).view(1, 1, -1))
        if not ring:
            g.memo[key] = indices
        else:
            last = g.op("Sub", g.op("Unsqueeze", g.starts, g.constant([1, 2])), g.constant(1))  # [B, 1, 1]
            age = g.op("Mod", g.op("Sub", last, indices), g.constant(size))
            new = g.op("Unsqueeze", g.positions(), g.constant([1]))
            g.memo[key] = g.op("Concat", g.op("Sub", last, age), new, axis=2)
    return g.memo[key]


def _mask(g: Lowering, keys: str, window: int | None, chunk: int | None) -> str:
    """Return the mask [B, 1, S, T], bool: True where a query sees a key."""
    key = ("mask", keys, window, chunk)
    if key not in g.memo:
        queries = g.op("Unsqueeze", g.positions(), g.constant([2]))  # [B, S, 1]
        rules = [g.op("LessOrEqual", keys, queries), g.op("GreaterOrEqual", keys, g.constant(0))]
        if window is not None:
            rules.append(g.op("Greater", keys, g.op("Sub", queries, g.constant(window))))
        if chunk is not None:
            chunks = [g.op("Div", x, g.constant(chunk)) for x in (keys, queries)]
            rules.append(g.op("Equal", *chunks))
        seen = rules[0]
        for rule in rules[1:]:
            seen = g.op("And", seen, rule)
        g.memo[key] = g.op("Unsqueeze", seen, g.constant([1]))
    return g.memo[key]


def _bias(g: Lowering, mask: str, dtype: torch.dtype) -> str:
    """Convert a bool mask to a bias that is added to the scores."""
    key = ("bias", mask, dtype)
    if key not in g.memo:
        zero, lowest = g.constant(0.0, dtype), g.constant(torch.finfo(dtype).min, dtype)
        g.memo[key] = g.op("Where", mask, zero, lowest)
    return g.memo[key]


def _alibi(g: Lowering, keys: str, slopes: Value, dtype: torch.dtype) -> str:
    """Return slope * (key - query), [B, H, S, T]."""
    key = ("alibi", keys, str(slopes), dtype)
    if key not in g.memo:
        queries = g.op("Unsqueeze", g.positions(), g.constant([2]))
        distance = g.cast(g.op("Unsqueeze", g.op("Sub", keys, queries), g.constant([1])), torch.float32)
        by_head = g.op("Reshape", g.cast(slopes, torch.float32), g.constant([-1, 1, 1]))
        g.memo[key] = g.cast(Value(g.op("Mul", distance, by_head), torch.float32), dtype)
    return g.memo[key]


def _composed(
    g: Lowering,
    q: Value,
    keys: str,
    values: str,
    kv_heads: int,
    mask: str,
    scale: float,
    softcap: float | None,
    sinks: Value | None,
) -> str:
    """Write attention in basic ops: ONNX's Attention has no sinks."""
    heads, dim = q.shape[1], q.shape[3]
    heads_per_kv = heads // kv_heads
    scaled = g.op("Mul", q, g.constant(scale, q.dtype))  # before the product, which could exceed the range of fp16
    stacked = g.op(
        "Reshape", scaled, g.constant([0, kv_heads, -1, dim])
    )  # the queries of all heads that share a kv head
    scores = g.op("MatMul", stacked, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    length = g.op("Shape", q, start=2, end=3)
    by_head = g.op("Concat", g.constant([0, heads]), length, g.constant([-1]), axis=0)
    scores = g.op("Reshape", scores, by_head)
    if softcap is not None:
        cap = g.constant(softcap, q.dtype)
        scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, cap)), cap)
    scores = g.op("Add", scores, mask)
    if sinks is not None:
        batch = g.op("Shape", q, start=0, end=1)
        sink_shape = g.op("Concat", batch, g.constant([heads]), length, g.constant([1]), axis=0)
        by_query = g.op("Reshape", g.cast(sinks, q.dtype), g.constant([1, heads, 1, 1]))
        scores = g.op("Concat", scores, g.op("Expand", by_query, sink_shape), axis=3)
    weights = g.op("Softmax", scores, axis=3)
    if sinks is not None:
        weights = g.op("Slice", weights, g.constant([0]), g.constant([-1]), g.constant([3]))
    stacked_shape = g.op(
        "Concat", g.constant([0, kv_heads]), g.op("Mul", length, g.constant([heads_per_kv])), g.constant([-1]), axis=0
    )
    out = g.op("MatMul", g.op("Reshape", weights, stacked_shape), values)
    return g.op("Reshape", out, g.op("Concat", g.constant([0, heads]), length, g.constant([-1]), axis=0))
