"""Rotary embeddings as the families of transformers spell them, in a model that needs little more."""

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
    """`rotate(model, x, positions)` on x [B, H, S, D] between an embedding and a head."""

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
        # As in a model, no linear step leads from here to another value of x's shape.
        return self.head(self.rotate(self, x, positions).tanh().transpose(1, 2).flatten(2).float())


def angles(frequencies: Tensor, positions: Tensor) -> Tensor:
    """As transformers computes them: a batched product [B, S, D/2]."""
    wide = frequencies[None, :, None].float().expand(positions.shape[0], -1, 1)
    return (wide @ positions[:, None, :].float()).transpose(1, 2)


def tables(frequencies: Tensor, positions: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, D], each angle twice."""
    both = torch.cat([angles(frequencies, positions)] * 2, -1)
    return both.cos() * scaling, both.sin() * scaling


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


# Spellings ----------------------------------------------------------------------------------------------------------


# transformers' own wording, in llama and most others.
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
    """The sign stands in the table."""
    angle = angles(m.frequencies, p)[:, None]
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    return x * torch.cat([angle.cos()] * 2, -1) + x.roll(HALF, -1) * sin


def backwards(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """By the negative angle."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return x * cos - rotate_half(x) * sin


def two_halves(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """gpt_oss: each half on its own."""
    cos, sin = angles(m.frequencies, p)[:, None].cos(), angles(m.frequencies, p)[:, None].sin()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def partial(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """gpt_neox, phi, stablelm: the first dims only."""
    cos, sin = (t[:, None] for t in tables(m.frequencies[:2], p))
    turning, passing = x[..., :4], x[..., 4:]
    return torch.cat((halves(turning, cos, sin), passing), -1)


def still_pairs(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Some pairs stand still, and no table says so."""
    cos, sin = angles(m.frequencies[:2], p)[:, None].cos(), angles(m.frequencies[:2], p)[:, None].sin()
    a, still, b, still_too = x.split(2, -1)
    return torch.cat((a * cos - b * sin, still, b * cos + a * sin, still_too), -1)


def zero_frequencies(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Some pairs stand still at every position."""
    cos, sin = (t[:, None] for t in tables(torch.cat([m.frequencies[:2], torch.zeros(2)]), p))
    return halves(x, cos, sin)


def rows_first(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """[B, S, H, D], as in ernie or nanochat."""
    cos, sin = (t.unsqueeze(2) for t in tables(m.frequencies, p))
    return halves(x.transpose(1, 2).contiguous(), cos, sin).transpose(1, 2)


def one_head(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """[B, S, D], as the shared key of deepseek is before its head."""
    cos, sin = tables(m.frequencies, p)
    return halves(x[:, 0], cos, sin).unsqueeze(1).expand(-1, HEADS, -1, -1)


def neighbours(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """glm, cohere, gptj."""
    cos, sin = (
        t.repeat_interleave(2, -1)[:, None] for t in (angles(m.frequencies, p).cos(), angles(m.frequencies, p).sin())
    )
    return x * cos + rotate_every_two(x) * sin


def cohere(m: Model, x: Tensor, p: Tensor) -> Tensor:
    wide = x.float()
    cos, sin = (
        t.repeat_interleave(2, -1)[:, None] for t in (angles(m.frequencies, p).cos(), angles(m.frequencies, p).sin())
    )
    return (wide * cos + rotate_every_two(wide) * sin).to(dtype=x.dtype)


def partial_neighbours(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """glm: half of the dims, in pairs of neighbours."""
    angle = angles(m.frequencies[:2], p)[:, None].repeat_interleave(2, -1)
    turning, passing = x[..., :4], x[..., 4:]
    return torch.cat([turning * angle.cos() + rotate_every_two(turning) * angle.sin(), passing], -1)


def complex_numbers(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """llama4, deepseek_v2."""
    turn = torch.polar(torch.ones_like(angles(m.frequencies, p)), angles(m.frequencies, p)).unsqueeze(1)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


def deinterleaved(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """deepseek_v3 of old: what is laid out anew is turned in halves."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    b, h, s, d = x.shape
    return halves(x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d), cos, sin)


def deepseek(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Pairs of neighbours come out as halves."""
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(m.frequencies, p))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def interleaved_again(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Halves come out as neighbours."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return halves(x, cos, sin).unflatten(-1, (2, HALF)).transpose(-1, -2).flatten(-2)


# Name: the rotation; (interleaved, dims that turn).
SPELLINGS: dict[str, tuple[Rotate, bool, int]] = {
    "llama": (llama, False, 8),
    "yarn": (yarn, False, 8),
    "commuted": (commuted, False, 8),
    "negative sin": (negative_sin, False, 8),
    "backwards": (backwards, False, 8),
    "two halves": (two_halves, False, 8),
    "partial": (partial, False, 4),
    "zero frequencies": (zero_frequencies, False, 8),
    "still pairs": (still_pairs, False, 8),
    "rows first": (rows_first, False, 8),
    "one head": (one_head, False, 8),
    "neighbours": (neighbours, True, 8),
    "cohere": (cohere, True, 8),
    "partial neighbours": (partial_neighbours, True, 4),
    "complex numbers": (complex_numbers, True, 8),
    "deinterleaved": (deinterleaved, False, 8),
    "deepseek": (deepseek, True, 8),
    "interleaved again": (interleaved_again, False, 8),
}
