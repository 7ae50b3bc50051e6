"""The dialect in ONNX Runtime's contrib ops, where they fuse more than standard ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..onnx.graph import MICROSOFT, Value
from ..onnx.lower import Lowering, Table
from ..onnx.standard import STANDARD
from .quantized_contrib import contrib_embedding, contrib_linear


def add_rms_norm(g: Lowering, x: Value, residual: Value, weight: Value | None, eps: float) -> tuple[str, str]:
    """Write a sum and its norm as one op, which reads memory once."""
    gain = g.constant(torch.ones(x.shape[-1], dtype=x.dtype)) if weight is None else weight
    y, _, _, total = g.op("SkipSimplifiedLayerNormalization", x, residual, gain, count=4, domain=MICROSOFT, epsilon=eps)
    return y, total


def linear(g: Lowering, x: Value, weight: Value, bias: Value | None) -> str:
    y = g.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)
    return y if bias is None else g.op("Add", y, bias)


@dataclass(frozen=True)
class GroupQueryAttention:
    """The op that includes the rotation and the update of the caches: what all its calls in a layer share."""

    heads: int
    scale: float
    cos: Value | None
    sin: Value | None
    interleaved: bool
    window: int | None
    softcap: float | None
    sinks: Value | None

    def write(
        self,
        g: Lowering,
        qkv: tuple[Value | str | None, ...],
        caches: tuple[Value, Value],
        lengths: tuple[str, str],
    ) -> tuple[str, str, str]:
        """Append a call; return its result and the updated caches.

        Args:
            lengths: see `attention_lengths`.
        """
        return g.op(
            "GroupQueryAttention", *qkv, *caches, *lengths, self.cos, self.sin, None, None, self.sinks,
            count=3, domain=MICROSOFT, num_heads=self.heads, kv_num_heads=int(caches[0].shape[1]), scale=self.scale,
            do_rotary=int(self.cos is not None), rotary_interleaved=int(self.interleaved),
            local_window_size=self.window, softcap=self.softcap,
        )  # fmt: skip


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
        shared: the fields of `GroupQueryAttention`.
    """
    return GroupQueryAttention(**shared).write(g, (q, k, v), (k_cache, v_cache), attention_lengths(g))


def attention_lengths(g: Lowering) -> tuple[str, str]:
    """Return the length inputs of GroupQueryAttention, int32.

    These are the number of positions of each sequence minus one, [B], and the number of positions of the longest, a
    scalar. Both include the new tokens.
    """
    if "lengths" not in g.memo:
        last = g.cast(g.op("Sub", g.held, g.constant([1])), torch.int32)
        g.memo["lengths"] = last, g.cast(g.op("Squeeze", g.total), torch.int32)
    return g.memo["lengths"]


CONTRIB: Table = STANDARD | {
    "llmc.add_rms_norm": add_rms_norm,
    "llmc.fused_attention": fused_attention,
    "llmc.linear": linear,
    "llmc.quant_embedding": contrib_embedding,
    "llmc.quant_linear": contrib_linear,
}
