"""The dialect in ONNX Runtime's contrib ops, where they fuse more than standard ones."""

from __future__ import annotations

from typing import Any

import torch

from ..onnx.graph import MICROSOFT, Value
from ..onnx.lower import Lowering, Table
from ..onnx.scores import attend
from ..onnx.standard import STANDARD
from .group_query_attention import GroupQueryAttention, Lengths, ManyQueries
from .quantized_contrib import contrib_embedding, contrib_linear


def add_rms_norm(g: Lowering, x: Value, residual: Value, weight: Value | None, eps: float) -> tuple[str, str]:
    """Write a sum and its norm as one op, which reads memory once."""
    ones = torch.ones(x.shape[-1], dtype=x.dtype)
    gain = g.constant(ones) if weight is None else g.convert(weight, x.dtype)
    y, _, _, total = g.op("SkipSimplifiedLayerNormalization", x, residual, gain, count=4, domain=MICROSOFT, epsilon=eps)
    return y, total


def linear(g: Lowering, x: Value, weight: Value, bias: Value | None) -> str:
    y = g.op("FusedMatMul", x, g.convert(weight, x.dtype), domain=MICROSOFT, transB=1)
    return y if bias is None else g.op("Add", y, g.convert(bias, x.dtype))


def fused_attention(
    g: Lowering,
    q: Value,
    k: Value | None,
    v: Value | None,
    k_cache: Value,
    v_cache: Value,
    starts: Value,
    **shared: Any,
) -> tuple[str, str, str]:
    """Write a GroupQueryAttention.

    Args:
        shared: the remaining arguments of the op.
    """
    for name in ("cos", "sin", "sinks"):
        shared[name] = shared[name] and g.convert(shared[name], q.dtype)
    attention = GroupQueryAttention(g, int(k_cache.shape[1]), **shared)
    many = many_queries(g) if attention.has_codes else None
    return attention.write(g, (q, k, v), (k_cache, v_cache), attention_lengths(g), many)


def attention_lengths(g: Lowering) -> Lengths:
    """Return the lengths of the graph's sequences."""
    if "lengths" not in g.memo:
        last = g.cast(g.op("Sub", g.held, g.constant([1])), torch.int32)
        g.memo["lengths"] = last, g.cast(g.op("Squeeze", g.total), torch.int32)
    return g.memo["lengths"]


def many_queries(g: Lowering) -> ManyQueries:
    """Return the places of the graph's new tokens."""
    if "many queries" not in g.memo:
        g.memo["many queries"] = ManyQueries.of(g, g.starts, g.total, g.positions())
    return g.memo["many queries"]


def composed_attention(g: Lowering, k_scales: None, v_scales: None, **call: Any) -> tuple[str, str, str]:
    """Write an attention that GroupQueryAttention is not for: with slopes, chunks or heads of other sizes.

    As products and a softmax: the CUDA provider's Attention takes neither every mask nor every number of heads.
    """
    return attend(g, is_composed=True, **call)


CONTRIB: Table = STANDARD | {
    "llmc.add_rms_norm": add_rms_norm,
    "llmc.fused_attention": fused_attention,
    "llmc.linear": linear,
    "llmc.quant_embedding": contrib_embedding,
    "llmc.quant_linear": contrib_linear,
}
CUDA: Table = CONTRIB | {"llmc.cached_attention": composed_attention}
"""For half precision on GPUs."""
