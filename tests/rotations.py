"""A small model, and the spellings of rotary embeddings in transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from check_pass import VOCAB
from torch import Tensor, nn

HEADS, WIDTH = 3, 8
HALF = WIDTH // 2
MAX = 32
Rotate = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """A model with `rotate(model, x, positions)` on x [B, H, S, D]."""

    def __init__(self, rotate: Rotate, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HEADS * WIDTH)
        self.head = nn.Linear(HEADS * WIDTH, VOCAB)
        self.frequencies = nn.Buffer(10.0 ** -torch.arange(0, 1, 1 / HALF))
        self.local = nn.Buffer(3.0 ** -torch.arange(0, 1, 1 / HALF))
        both = (torch.arange(MAX)[:, None] * self.frequencies).repeat(1, 2)
        self.cos, self.sin = nn.Buffer(both.cos()), nn.Buffer(both.sin())
        self.trained_cos, self.trained_sin = nn.Parameter(both.cos()), nn.Parameter(both.sin())
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.rotate, self.dtype = rotate, dtype

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens).to(self.dtype).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        # As in a real model, the rotation is not followed by linear calls that keep the shape of x.
        return self.head(self.rotate(self, x, positions).tanh().transpose(1, 2).flatten(2).float())


def angles(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Angles [B, S, D/2] by a batched product, as transformers computes them."""
    wide = frequencies[None, :, None].float().expand(positions.shape[0], -1, 1)
    return (wide @ positions[:, None, :].float()).transpose(1, 2)


def tables(frequencies: Tensor, positions: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, D], with each angle twice."""
    both = torch.cat([angles(frequencies, positions)] * 2, -1)
    return both.cos() * scaling, both.sin() * scaling


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


# Spellings ----------------------------------------------------------------------------------------------------------


# The spelling of llama and most other models.
def llama(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in tables(m.frequencies, p))
    return halves(x, cos, sin)


def yarn(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(m.frequencies, p, 1.27))
    return halves(x, cos, sin)


def commuted(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return sin * rotate_half(x) + cos * x


def negative_sin(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """The sign is part of the sine table."""
    angle = angles(m.frequencies, p)[:, None]
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    return x * torch.cat([angle.cos()] * 2, -1) + x.roll(HALF, -1) * sin


def backwards(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """A rotation by the negative angle."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return x * cos - rotate_half(x) * sin


def two_halves(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """gpt_oss: each half by itself."""
    cos, sin = angles(m.frequencies, p)[:, None].cos(), angles(m.frequencies, p)[:, None].sin()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def partial(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """gpt_neox, phi, stablelm: only the first dims are rotated."""
    cos, sin = (t[:, None] for t in tables(m.frequencies[:2], p))
    rotated, kept = x[..., :4], x[..., 4:]
    return torch.cat((halves(rotated, cos, sin), kept), -1)


def unrotated_pairs(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Some pairs are not rotated, and the tables have no columns for them."""
    cos, sin = angles(m.frequencies[:2], p)[:, None].cos(), angles(m.frequencies[:2], p)[:, None].sin()
    a, kept, b, also_kept = x.split(2, -1)
    return torch.cat((a * cos - b * sin, kept, b * cos + a * sin, also_kept), -1)


def zero_frequencies(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Some frequencies are zero, so their pairs are not rotated."""
    cos, sin = (t[:, None] for t in tables(torch.cat([m.frequencies[:2], torch.zeros(2)]), p))
    return halves(x, cos, sin)


def positions_first(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """The layout [B, S, H, D], as in ernie or nanochat."""
    cos, sin = (t.unsqueeze(2) for t in tables(m.frequencies, p))
    return halves(x.transpose(1, 2).contiguous(), cos, sin).transpose(1, 2)


def one_head(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """The layout [B, S, D], as of deepseek's shared key before it has heads."""
    cos, sin = tables(m.frequencies, p)
    return halves(x[:, 0], cos, sin).unsqueeze(1).expand(-1, HEADS, -1, -1)


def neighbours(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """glm, cohere, gptj: pairs of neighbours."""
    cos, sin = (
        t.repeat_interleave(2, -1)[:, None] for t in (angles(m.frequencies, p).cos(), angles(m.frequencies, p).sin())
    )
    return x * cos + rotate_every_two(x) * sin


def cohere(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """cohere: pairs of neighbours, computed in float32."""
    wide = x.float()
    cos, sin = (
        t.repeat_interleave(2, -1)[:, None] for t in (angles(m.frequencies, p).cos(), angles(m.frequencies, p).sin())
    )
    return (wide * cos + rotate_every_two(wide) * sin).to(dtype=x.dtype)


def partial_neighbours(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """glm: half of the dims, in pairs of neighbours."""
    angle = angles(m.frequencies[:2], p)[:, None].repeat_interleave(2, -1)
    rotated, kept = x[..., :4], x[..., 4:]
    return torch.cat([rotated * angle.cos() + rotate_every_two(rotated) * angle.sin(), kept], -1)


def complex_numbers(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """llama4, deepseek_v2: pairs as complex numbers."""
    factor = torch.polar(torch.ones_like(angles(m.frequencies, p)), angles(m.frequencies, p)).unsqueeze(1)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * factor).flatten(3).type_as(x)


def deinterleaved(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Older deepseek_v3: neighbours are moved into halves, which are then rotated."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    b, h, s, d = x.shape
    return halves(x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d), cos, sin)


def deepseek(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Input pairs are neighbours, output pairs are in two halves."""
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(m.frequencies, p))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def interleaved_again(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Input pairs are in two halves, output pairs are neighbours."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return halves(x, cos, sin).unflatten(-1, (2, HALF)).transpose(-1, -2).flatten(-2)


# Name: (rotation, whether it is interleaved, number of rotated dims).
SPELLINGS: dict[str, tuple[Rotate, bool, int]] = {
    "llama": (llama, False, 8),
    "yarn": (yarn, False, 8),
    "commuted": (commuted, False, 8),
    "negative sin": (negative_sin, False, 8),
    "backwards": (backwards, False, 8),
    "two halves": (two_halves, False, 8),
    "partial": (partial, False, 4),
    "zero frequencies": (zero_frequencies, False, 8),
    "unrotated pairs": (unrotated_pairs, False, 8),
    "positions first": (positions_first, False, 8),
    "one head": (one_head, False, 8),
    "neighbours": (neighbours, True, 8),
    "cohere": (cohere, True, 8),
    "partial neighbours": (partial_neighbours, True, 4),
    "complex numbers": (complex_numbers, True, 8),
    "deinterleaved": (deinterleaved, False, 8),
    "deepseek": (deepseek, True, 8),
    "interleaved again": (interleaved_again, False, 8),
}
