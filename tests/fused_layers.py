"""Layers of attention in all forms that the fused op takes."""

from __future__ import annotations

from typing import Any

import torch
from attending import channel_scales
from check_pass import capture
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import attention, embedding, linear, rope
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.match.remove_no_ops import RemoveNoOps

WIDTH, VOCAB, HEADS, KV_HEADS = 32, 31, 4, 2


class Layer(nn.Module):
    """A layer of attention; if packed, one linear layer computes q, k and v."""

    def __init__(self, dim: int, *, packed: bool = True, rotary: int = 0, interleaved: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.packed, self.rotary, self.interleaved, self.options = dim, packed, rotary, interleaved, options
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.sizes = [HEADS * dim, KV_HEADS * dim, KV_HEADS * dim]
        self.qkv = nn.Linear(WIDTH, sum(self.sizes))
        self.parts = nn.ModuleList(nn.Linear(WIDTH, size) for size in self.sizes)
        self.head = nn.Linear(HEADS * dim, VOCAB)
        angles = torch.arange(32.0)[:, None] * torch.linspace(1, 0.1, max(1, rotary // 2))
        self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())
        self.sinks = nn.Parameter(torch.linspace(-1, 2, HEADS))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = embedding(tokens, self.embed.weight)
        if self.packed:
            projections = linear(x, self.qkv.weight, self.qkv.bias).split(self.sizes, -1)
        else:
            projections = [linear(x, part.weight, part.bias) for part in self.parts]
        q, k, v = (each.unflatten(-1, (-1, self.dim)).transpose(1, 2) for each in projections)
        if self.rotary:
            q, k = (rope(each, positions, self.cos, self.sin, self.interleaved) for each in (q, k))
        options = self.options | ({"sinks": self.sinks} if "sinks" in self.options else {})
        out = attention(q, k, v, self.dim**-0.5 * 1.3, **options)
        return linear(out.transpose(1, 2).flatten(2), self.head.weight, self.head.bias)


def fused(*, by_channel: bool = False, **options: Any) -> Program:
    """Return a program with a fused attention.

    Args:
        by_channel: keys and values are int8 codes with constant scales.
    """
    program = capture(Layer(**options), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)
    codes = ("int8", 0, [channel_scales(KV_HEADS, options["dim"])]) if by_channel else ()
    InsertKvCache(False, *codes)(program)
    assert FuseAttention(8)(program).matches == 1
    return program


FORMS: dict[str, dict[str, Any]] = {
    "packed": {"dim": 16},
    "not packed": {"dim": 16, "packed": False},
    "rotated": {"dim": 16, "rotary": 16},
    "rotated, not packed": {"dim": 16, "rotary": 16, "packed": False},
    "interleaved": {"dim": 16, "rotary": 16, "interleaved": True},
    "partly rotated": {"dim": 32, "rotary": 16},
    "partly rotated, interleaved, not packed": {"dim": 32, "rotary": 16, "interleaved": True, "packed": False},
    "a window": {"dim": 16, "rotary": 16, "window": 6},
    "a cap": {"dim": 16, "softcap": 0.5},
    "sinks": {"dim": 16, "sinks": True},
    "a window, a cap and sinks": {"dim": 16, "rotary": 16, "window": 6, "softcap": 0.5, "sinks": True},
    "a head size of 8": {"dim": 8},
}
