"""Fused attention as ONNX Runtime's GroupQueryAttention, which includes the rotation and the update of the caches.

With int8 caches, the op dequantizes codes on its way, again for each query. That is the fastest way for few queries.
For many, the codes are cast to numbers once, and the op for numbers attends to those:

    attention(q, k, v)  becomes  If many queries:  codes of k and v are written to the caches;
                                                   out = attention(q * k_scales, cached codes, new codes) * v_scales
                                 else:             out = attention(q, k, v)

A code is not multiplied by the scale of its channel: multiplying queries and outputs is the same, and less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..onnx.graph import MICROSOFT, Value
from ..onnx.lower import Lowering

# From this many tokens of a sequence on, codes are cast first.
MANY_QUERIES = 12

Lengths = tuple[str, str]
"""Of the sequences, new tokens included: the number of positions minus one, int32 [B], and that of the longest."""


@dataclass(frozen=True)
class ManyQueries:
    """The places of many new tokens: S of each of B sequences. Attention by numbers needs them.

    Attributes:
        condition: True if S is at least MANY_QUERIES; a scalar.
        starts: the number of positions of each sequence before the call, [B].
        old: the number of positions of the longest sequence before the call, [1].
        positions: those of the new tokens, [B, S].
    """

    condition: str
    starts: Value
    old: str
    positions: Value

    @classmethod
    def of(cls, g: Lowering, starts: Value, longest: Value, positions: Value) -> ManyQueries:
        """Make it in the outermost graph.

        Args:
            longest: the number of positions of the longest sequence after the call, [1].
        """
        count = g.op("Shape", positions, start=1, end=2)
        are_many = g.op("Squeeze", g.op("GreaterOrEqual", count, g.constant([MANY_QUERIES])))
        return cls(are_many, starts, g.op("Sub", longest, count), positions)


class GroupQueryAttention:
    """An attention of the program; it may be written several times, for different tokens.

    Make it in the outermost graph: it appends nodes that all its calls share.

    Args:
        kv_heads: the number of heads of the caches.
        shared: the arguments of `fused_attention` from `heads` on.
    """

    def __init__(self, g: Lowering, kv_heads: int, **shared: Any) -> None:
        self.heads, self.kv_heads = int(shared["heads"]), kv_heads
        self.cos, self.sin, self.interleaved = shared["cos"], shared["sin"], int(shared["interleaved"])
        self.sinks = shared["sinks"]
        self._options = {
            "num_heads": self.heads,
            "kv_num_heads": kv_heads,
            "scale": shared["scale"],
            "local_window_size": shared["window"],
            "softcap": shared["softcap"],
        }
        scales = shared["k_scales"], shared["v_scales"]
        self.has_codes = scales[0] is not None
        if self.has_codes:
            self._dims = [int(each.shape[1]) for each in scales]
            self._scales = [g.op("Reshape", each, g.constant([-1])) for each in scales]
            self._scales_by_head = [self._by_head(g, each) for each in scales]

    def write(
        self,
        g: Lowering,
        qkv: Sequence[Value | str | None],
        caches: Sequence[Value],
        lengths: Lengths,
        many: ManyQueries | None = None,
    ) -> tuple[str, str, str]:
        """Append a call; return its result and the updated caches.

        Args:
            many: None if the caches have no codes, or if each sequence has one token.
        """
        if many is None:
            return self._fused(g, qkv, caches, lengths)
        out, keys, values = g.if_else(
            many.condition,
            lambda: self._by_numbers(g, qkv, caches, lengths, many),
            lambda: self._fused(g, qkv, caches, lengths),
            [torch.float32, torch.int8, torch.int8],
        )
        return out, keys, values

    def _fused(
        self, g: Lowering, qkv: Sequence[Value | str | None], caches: Sequence[Value], lengths: Lengths
    ) -> tuple[str, str, str]:
        inputs = [*qkv, *caches, *lengths, self.cos, self.sin, None, None, self.sinks]
        options: dict[str, Any] = {"do_rotary": int(self.cos is not None), "rotary_interleaved": self.interleaved}
        if self.has_codes:
            inputs += self._scales
            options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return self._op(g, *inputs, **options)

    def _by_numbers(
        self,
        g: Lowering,
        qkv: Sequence[Value | str | None],
        caches: Sequence[Value],
        lengths: Lengths,
        many: ManyQueries,
    ) -> tuple[str, str, str]:
        q, k, v = self._split(g, qkv)
        if self.cos is not None:
            q, k = self._rotated(g, q, self.heads, many), self._rotated(g, k, self.kv_heads, many)
        numbers, old, written = [], [], []
        for new, scales, cache, dim in zip((k, v), self._scales, caches, self._dims, strict=True):
            units = g.op("Div", new, scales)
            codes = g.op("QuantizeLinear", units, g.constant(1.0, torch.float32), g.constant(0, torch.int8))
            numbers.append(g.cast(codes, torch.float32))
            held = g.op("Slice", cache, g.constant([0]), many.old, g.constant([2]))
            old.append(g.cast(held, torch.float32))
            heads = g.op("Reshape", codes, g.constant([0, 0, self.kv_heads, dim]))
            heads = g.op("Transpose", heads, perm=[0, 2, 1, 3])
            written.append(g.op("TensorScatter", cache, heads, many.starts, axis=2))
        k_scales, v_scales = self._scales_by_head
        inputs = [g.op("Mul", q, k_scales), *numbers, *old, *lengths, None, None, None, None, self.sinks]
        out, _, _ = self._op(g, *inputs)
        return g.op("Mul", out, v_scales), *written

    def _op(self, g: Lowering, *inputs: Value | str | None, **options: Any) -> tuple[str, str, str]:
        return g.op("GroupQueryAttention", *inputs, count=3, domain=MICROSOFT, **self._options, **options)

    def _split(self, g: Lowering, qkv: Sequence[Value | str | None]) -> Sequence[Any]:
        if qkv[1] is not None:
            return qkv
        kv = [self.kv_heads * dim for dim in self._dims]
        sizes = g.constant([self.heads * self._dims[0], *kv])
        return g.op("Split", qkv[0], sizes, count=3, axis=2)

    def _rotated(self, g: Lowering, x: Value | str, heads: int, many: ManyQueries) -> str:
        assert self.cos is not None
        rotated = 2 * int(self.cos.shape[-1])
        return g.op(
            "RotaryEmbedding", x, self.cos, self.sin, many.positions, num_heads=heads, interleaved=self.interleaved,
            rotary_embedding_dim=None if rotated == self._dims[0] else rotated,
        )  # fmt: skip

    def _by_head(self, g: Lowering, scales: Value) -> str:
        """Return the scales [Hk, D] for the channels of all query heads, [H * D]."""
        dim = int(scales.shape[1])
        shared = g.op("Reshape", scales, g.constant([self.kv_heads, 1, dim]))
        repeated = g.op("Expand", shared, g.constant([self.kv_heads, self.heads // self.kv_heads, dim]))
        return g.op("Reshape", repeated, g.constant([-1]))
