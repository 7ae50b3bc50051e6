"""Two-layer models whose attention is a function of the test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from check_pass import VOCAB, capture
from torch import Tensor, nn

from llmc.ir.caches import ChannelScales
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import embedding, linear
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.match.remove_no_ops import RemoveNoOps

WIDTH, HEADS, KV_HEADS, DIM, VALUE_DIM = 12, 4, 2, 32, 4
SCALE = DIM**-0.5
MAX_SEQ_LEN = 32
Attend = Callable[["Attending", int, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """The projections of one layer, and its attention with a residual."""

    def __init__(self, value_dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, KV_HEADS * DIM)
        self.v = nn.Linear(WIDTH, KV_HEADS * value_dim)
        self.qkv = nn.Linear(WIDTH, (HEADS + KV_HEADS) * DIM + KV_HEADS * value_dim)
        self.o = nn.Linear(HEADS * value_dim, WIDTH)

    def forward(self, m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        return x + project(m.attend(m, place, x, positions), self.o)


class Attending(nn.Module):
    """Two layers with `attend(model, place, x, positions)` -> [B, S, H*Dv] in each.

    `place` is the index of the layer.
    """

    def __init__(self, attend: Attend, value_dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(value_dim) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)
        angles = torch.arange(float(MAX_SEQ_LEN))[:, None] * 0.6 ** torch.arange(8)  # of 16 dims
        self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())
        self.sinks = nn.Parameter(torch.linspace(-1, 2, HEADS))
        self.slopes = nn.Buffer(torch.linspace(0.1, 0.9, HEADS))
        self.attend = attend
        self.held: tuple[Tensor, Tensor] | None = None  # keys and values for a later layer

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = embedding(tokens, self.embed.weight)
        for place, layer in enumerate(self.layers):
            x = layer(self, place, x, positions)
        return project(x, self.head)


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, S, H*D] -> [B, H, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H*D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def qkv(m: Attending, place: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layer = m.layers[place]
    q, k, v = project(x, layer.q), project(x, layer.k), project(x, layer.v)
    return split(q, HEADS), split(k, KV_HEADS), split(v, KV_HEADS)


def channel_scales(heads: int = KV_HEADS, dim: int = DIM, value_dim: int | None = None) -> ChannelScales:
    """Scales with which numbers between -1 and 1 are rounded visibly; larger ones saturate."""
    keys, values = (torch.linspace(0.008, 0.03, heads * n).view(heads, n) for n in (dim, value_dim or dim))
    return ChannelScales(keys, values.flip(1))


def optimized(attend: Attend, value_dim: int = VALUE_DIM) -> Program:
    """The optimized program, without a cache."""
    module = Attending(attend, value_dim)
    return capture(module, first=[RemoveNoOps()], stage=Stage.OPTIMIZED, max_seq_len=MAX_SEQ_LEN)


def cached(
    attend: Attend,
    ring: bool = True,
    value_dim: int = DIM,
    codes: str | None = None,
    slack: int = 0,
    by_channel: bool = False,
) -> Program:
    """The program with a KV cache; by default keys and values have the same width.

    Args:
        by_channel: the scales of codes are constants.
    """
    program = optimized(attend, value_dim)
    scales = [channel_scales(value_dim=value_dim)] * 2 if by_channel else []
    InsertKvCache(ring, codes, slack, scales)(program)
    return program
