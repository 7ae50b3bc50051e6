"""Attention in context: other modules, other users, masks from outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import (
    LOWEST,
    SCALE,
    SOFTMAX,
    WIDTH,
    H,
    Model,
    alibi_as_the_base,
    attention_arguments,
    causal,
    eager,
    finish,
    masked,
    seen_by,
    slopes,
    tril,
    window_in_a_buffer,
)
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn

from llmc.kernels.ops import attention
from llmc.passes.base import Fuel
from llmc.passes.match.match_attention import MatchAttention


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).chunk(3, -1)
        return self.head(finish((q @ k.mT * 0.2) + torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1), v))


class TorchModule(nn.Module):
    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.attention = nn.MultiheadAttention(WIDTH, H, batch_first=batch_first)
        nn.init.normal_(self.attention.in_proj_bias)
        self.need_weights, self.batch_first = need_weights, batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x if self.batch_first else x.transpose(0, 1)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x, _ = self.attention(x, x, x, attn_mask=mask, need_weights=self.need_weights)
        return self.head(x if self.batch_first else x.transpose(0, 1))


def test_a_single_head_without_a_head_dim() -> None:
    program = check_pass(MatchAttention(), OneHead(), matches=1, gone=SOFTMAX)
    assert attention_arguments(program)["causal"]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_multihead_attention(need_weights: bool, batch_first: bool) -> None:
    program = check_pass(MatchAttention(), TorchModule(need_weights, batch_first), matches=1, gone=SOFTMAX)
    assert attention_arguments(program)["causal"]
    assert attention_arguments(program)["scale"] == pytest.approx(SCALE)
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert node.meta["val"].shape[1] == H  # heads are not merged with the batch


def test_tiled_heads_are_not_taken_for_repeated_ones() -> None:
    def attend(m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        b, heads, s, d = k.shape
        k, v = (x[:, None].expand(b, H // heads, heads, s, d).reshape(b, H, s, d) for x in (k, v))
        return eager(m, q, k, v, tokens)

    program = check_pass(MatchAttention(), Model(attend, 2), matches=1, gone=SOFTMAX)
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert node.args[1].meta["val"].shape[1] == H


def test_a_bias_that_is_no_alibi_is_passed_to_the_op() -> None:
    def attend(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        bias = F.embedding((at[:, None] - at).clamp(0, 8), m.table).permute(2, 0, 1)[None]  # [1, H, S, S]
        mask = torch.where(seen_by(causal, q), 0.0, LOWEST)
        return finish((q @ k.mT + (bias + mask)) * 0.5, v)

    table = torch.randn(9, H, generator=torch.Generator().manual_seed(0))
    program = check_pass(MatchAttention(), Model(attend, table=table), matches=1, gone=SOFTMAX | {"aten.where"})
    assert attention_arguments(program)["bias"] is not None
    assert attention_arguments(program)["slopes"] is None


def test_a_mask_computed_from_positions() -> None:
    class Positional(Model):
        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            self.seen = (positions[:, None, :, None] >= positions[:, None, None, :]) & (
                positions[:, None, :, None] < positions[:, None, None, :] + 3
            )
            return super().forward(tokens, positions)

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m.seen)

    program = check_pass(MatchAttention(), Positional(attend), matches=1, gone=SOFTMAX)
    assert attention_arguments(program)["window"] == 3


def test_finds_a_window_larger_than_the_short_lengths() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & (i - j < 100)), v)

    program = capture(Model(attend), max_seq_len=400)
    assert attention_arguments(check_pass(MatchAttention(), program, matches=1))["window"] == 100


def test_finds_a_large_window_in_a_buffer() -> None:
    band = tril(400).bitwise_xor(tril(400).tril(-100))
    program = capture(Model(window_in_a_buffer, mask=band), max_seq_len=400)
    assert attention_arguments(check_pass(MatchAttention(), program, matches=1))["window"] == 100


def test_attention_weights_with_another_user_stay() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        weights = torch.softmax(masked(q @ k.mT * SCALE), -1)
        return weights @ v + weights.amax(-1, keepdim=True)

    check_pass(MatchAttention(), Model(attend), matches=1, there={"aten.softmax", "llmc.attention"})


def test_scaled_queries_with_another_user_stay() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        q = q * 0.5
        return finish(masked(q @ k.mT), v) + q

    program = check_pass(MatchAttention(), Model(attend), matches=1, there={"aten.mul"})
    assert attention_arguments(program)["scale"] == 1.0


def test_a_scale_per_head_stays() -> None:
    def attend(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return finish(masked((q * m.scales[:, None, None]) @ k.mT), v)

    model = Model(attend, scales=torch.tensor([0.5, 0.25, 0.3, 0.7]))
    assert attention_arguments(check_pass(MatchAttention(), model, matches=1, there={"aten.mul"}))["scale"] == 1.0


def test_half_precision_with_a_wide_softmax() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        scores = q.float() @ k.float().mT * SCALE
        return torch.softmax(masked(scores), -1).to(v.dtype) @ v

    # The module rounds attention weights to bfloat16 and the op does not: an error of 2**-9 at values of about 1.
    program = check_pass(MatchAttention(), Model(attend).bfloat16(), matches=1, gone=SOFTMAX, atol=0.02)
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert {n.meta["val"].dtype for n in node.args[:3]} == {torch.bfloat16}


def test_layers_share_alibi_slopes() -> None:
    class Two(Model):
        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            return super().forward(tokens, positions) + super().forward(tokens + 1 - 1, positions)

    program = check_pass(MatchAttention(), Two(alibi_as_the_base, slopes=slopes()), matches=2, gone=SOFTMAX)
    assert [name for name in program.weights if "alibi" in name] == ["alibi_slopes"]


def test_fuel_stops_it() -> None:
    program = capture(Model(eager))
    assert MatchAttention()(program, Fuel(0)).matches == 0
    assert "aten.softmax" in program.ops()
