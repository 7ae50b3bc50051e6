"""A small model of layers, some of which are identical."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH = 31, 8


class Layer(nn.Module):
    def __init__(self, eps: float, act: str, number: int) -> None:
        super().__init__()
        self.eps, self.act = eps, act
        generator = torch.Generator().manual_seed(number)
        self.scale = nn.Parameter(torch.rand(WIDTH, generator=generator) + 0.5)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale
        return x + getattr(F, self.act)(self.up(normed))


class Stack(nn.Module):
    """A model with one layer for each (eps, activation)."""

    def __init__(self, *kinds: tuple[float, str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(*kind, number) for number, kind in enumerate(kinds))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
