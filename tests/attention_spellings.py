"""A model whose attention is a function of the test, and parts of spellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from check_pass import VOCAB
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.kernels.ops import attention

H, D, WIDTH = 4, 6, 24
SCALE = D**-0.5
LOWEST = torch.finfo(torch.float32).min
SOFTMAX = {"aten.softmax", "aten.scaled_dot_product_attention"}

Attend = Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """A model with one attention, `attend(model, q, k, v, tokens)` on [B, H, S, D]."""

    def __init__(self, attend: Attend, kv_heads: int = H, **buffers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.q = nn.Linear(WIDTH, H * D)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * D) for _ in range(2))
        self.head = nn.Linear(H * D, VOCAB)
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (p(x).view(*tokens.shape, -1, D).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = self.attend(self, q, k, v, tokens)
        return self.head(out.transpose(1, 2).reshape(*tokens.shape, H * D))


def tril(length: int = 32) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def seen_by(rule: Callable[[Tensor, Tensor], Tensor], like: Tensor) -> Tensor:
    """The mask [1, 1, S, S] of a rule on query and key positions."""
    at = torch.arange(like.shape[2])
    return rule(at[:, None], at[None])[None, None]


def causal(query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def finish(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def masked(scores: Tensor, rule: Callable[[Tensor, Tensor], Tensor] = causal) -> Tensor:
    return torch.where(seen_by(rule, scores), scores, LOWEST)


def attention_arguments(program: Program) -> dict[str, Any]:
    """The arguments of the only attention op, without q, k and v."""
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    bound = attention.bind(node.args, dict(node.kwargs))
    return {name: value for name, value in bound.items() if name not in "qkv"}


def slopes() -> Tensor:
    return torch.tensor([2.0**-n for n in (1, 3, 4, 6)])


def eager(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    mask = torch.where(seen_by(causal, q), torch.zeros(()), LOWEST).expand(q.shape[0], -1, -1, -1)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=m.training), v)


def window_in_a_buffer(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    return finish(torch.where(m.mask[:s, :s], q @ k.mT * SCALE, torch.tensor(LOWEST)), v)


def alibi_as_the_base(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    ones = torch.ones(b, s, dtype=torch.long)
    alibi = (m.slopes[:, None] * ((ones.cumsum(-1) - 1) * ones)[:, None, :]).reshape(b * heads, 1, s)
    scores = alibi.baddbmm(q.reshape(b * heads, -1, d), k.reshape(b * heads, -1, d).mT, beta=1.0, alpha=SCALE)
    weights = F.softmax(scores.view(b, heads, s, -1) + torch.where(seen_by(causal, q), 0.0, LOWEST), -1)
    return torch.bmm(weights.view(b * heads, s, -1), v.reshape(b * heads, -1, d)).view(b, heads, s, d)
