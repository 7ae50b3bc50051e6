"""The layers of attention: rotary embeddings, updates of caches, and attention itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from .call import Call
from .dtypes import widen
from .reductions import softmax_over

_PADDED = "PADDED_BHND"


def rotary_embedding(call: Call) -> np.ndarray:
    """Rotate pairs of channels of [B, H, S, D]; the cosines are [B, S, D/2], or a table and positions [B, S]."""
    x, cos, sin = (widen(call.input(i)) for i in range(3))
    positions = call.optional(3)
    if positions is not None:
        _check_range(positions, len(cos), "position")
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, None], sin[:, None]
    width = call.layer.rotary_embedding_dim or x.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    if call.layer.interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(rotated.shape)
    else:
        a, b = np.split(rotated, 2, axis=-1)
        rotated = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return np.concatenate([rotated, rest], axis=-1)


def kv_cache_update(call: Call) -> np.ndarray:
    """Write new tokens [B, H, S, D] to a copy of a cache [B, H, T, D], from each sequence's own index on."""
    cache, new, starts, layer = call.input(0).copy(), call.input(1), call.input(2), call.layer
    _check_padded(call, layer, "update_form")
    if layer.cache_mode.name != "LINEAR":
        raise call.refuse(f"the cache mode {layer.cache_mode.name}")
    length = new.shape[2]
    _check_range(starts, cache.shape[2] - length + 1, "write index")
    for sequence, start in enumerate(starts):
        cache[sequence, :, start : start + length] = new[sequence]
    return cache


def attention_input(call: Call) -> np.ndarray:
    """Return the query; the layer that ends the attention reads all inputs itself."""
    return call.input(0)


def attention(call: Call) -> np.ndarray:
    """Attend from [B, H, S, D] to keys and values of fewer heads, with a mask of bools or numbers, or causally."""
    of = call.layer.attention
    for form in ("query_form", "key_value_form"):
        _check_padded(call, of, form)
    for option in ("query_lengths", "key_value_lengths", "normalization_quantize_scale"):
        if getattr(of, option, None) is not None:
            raise call.refuse(f"attention with {option}")
    query, keys, values = (widen(call.input(i)) for i in range(3))
    per_kv_head = query.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x, per_kv_head, axis=1) for x in (keys, values))
    scores = _masked(call, np.matmul(query, np.swapaxes(keys, -1, -2)), of.causal_kind.name)
    weights = softmax_over(scores, (3,)) if of.norm_op.name == "SOFTMAX" else scores
    return np.matmul(weights, values)


def _masked(call: Call, scores: np.ndarray, causal: str) -> np.ndarray:
    """Apply the mask to scores [B, H, S, T]."""
    mask = call.optional(3)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + widen(mask)
    if causal == "NONE":
        return scores
    queries, keys = scores.shape[2:]
    offset = {"UPPER_LEFT": 0, "LOWER_RIGHT": keys - queries}[causal]
    return np.where(np.arange(keys) <= np.arange(queries)[:, None] + offset, scores, -np.inf)


def _check_padded(call: Call, holder: Any, form: str) -> None:
    """Refuse packed sequences. Versions without the attribute have padded ones only."""
    value = getattr(holder, form, None)
    if value is not None and value.name != _PADDED:
        raise call.refuse(f"{form} {value.name}")


def _check_range(indices: np.ndarray, size: int, what: str) -> None:
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise IndexError(f"{what} from {indices.min()} to {indices.max()}, but only 0 to {size - 1} exist")
