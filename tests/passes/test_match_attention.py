"""Every spelling of attention that families use becomes the one op, with the rule that its mask follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn

from llmc.compiler.ir.program import Program
from llmc.kernels.ops import attention
from llmc.passes.base import Fuel
from llmc.passes.match_attention import MatchAttention

H, D, WIDTH = 4, 6, 24
SCALE = D**-0.5
LOWEST = torch.finfo(torch.float32).min
SOFTMAX = {"aten.softmax", "aten.scaled_dot_product_attention"}

Attend = Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Tokens to logits with one attention between, which is `attend(model, q, k, v, tokens)` on [B, H, S, D]."""

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
    """[1, 1, S, S] from a rule on query and key positions."""
    at = torch.arange(like.shape[2])
    return rule(at[:, None], at[None])[None, None]


def causal(query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def finish(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def masked(scores: Tensor, rule: Callable[[Tensor, Tensor], Tensor] = causal) -> Tensor:
    return torch.where(seen_by(rule, scores), scores, LOWEST)


def found(program: Program) -> dict[str, Any]:
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    bound = attention.bind(node.args, dict(node.kwargs))
    return {name: value for name, value in bound.items() if name not in "qkv"}


def slopes() -> Tensor:
    return torch.tensor([2.0**-n for n in (1, 3, 4, 6)])


# --- spellings: (attend, what the op must say, buffers, heads of k and v) ---


def eager(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    mask = torch.where(seen_by(causal, q), torch.zeros(()), LOWEST).expand(q.shape[0], -1, -1, -1)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=m.training), v)


def eager_with_repeated_heads(m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        b, heads, s, d = x.shape
        return x[:, :, None, :, :].expand(b, heads, H // heads, s, d).reshape(b, H, s, d)

    return eager(m, q, repeat(k), repeat(v), tokens)


def interleaved_heads(m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    return eager(m, q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, 1), tokens)


def one_kv_head_broadcast(m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    return eager(m, q, k, v, tokens)


def torch_causal(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def torch_grouped(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def torch_bool_mask(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask[:s, :s])


def torch_added_mask(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -torch.inf).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def torch_unmasked(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def filled(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(D)
    return finish(scores.masked_fill(~seen_by(causal, q), -torch.inf), v)


def scaled_before(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked((q * 0.5) @ (k / 3.0).mT * 2.0), v)


def constant_tensor_scale(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT / m.scale), v)


def merged_with_the_batch(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    q, k, v = (x.reshape(b * heads, -1, d) for x in (q * SCALE, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, heads, s, s) + torch.where(seen_by(causal, v[None]), 0.0, LOWEST)
    scores = torch.max(scores, torch.full((), LOWEST)).view(b * heads, s, s)
    weights = F.softmax(scores, -1).view(b, heads, s, s).view(b * heads, s, s)
    return torch.bmm(weights, v).view(b, heads, s, d)


def on_a_base_of_zeros(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    base = torch.zeros(b * heads, s, s, dtype=q.dtype)
    scores = torch.baddbmm(base, q.reshape(b * heads, s, d), k.reshape(b * heads, s, d).mT, beta=1.0, alpha=SCALE)
    return finish(scores.view(b, heads, s, -1) + torch.where(seen_by(causal, q), 0.0, LOWEST), v)


def on_an_empty_base(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    base = torch.empty(b * heads, s, s)
    keys = k.transpose(-1, -2).reshape(-1, d, s)
    scores = torch.baddbmm(base, q.reshape(-1, s, d), keys, beta=0, alpha=SCALE).reshape(b, heads, s, s)
    return finish(masked(scores), v)


def alibi_as_the_base(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    ones = torch.ones(b, s, dtype=torch.long)
    alibi = (m.slopes[:, None] * ((ones.cumsum(-1) - 1) * ones)[:, None, :]).reshape(b * heads, 1, s)
    scores = alibi.baddbmm(q.reshape(b * heads, -1, d), k.reshape(b * heads, -1, d).mT, beta=1.0, alpha=SCALE)
    weights = F.softmax(scores.view(b, heads, s, -1) + torch.where(seen_by(causal, q), 0.0, LOWEST), -1)
    return torch.bmm(weights.view(b * heads, s, -1), v.reshape(b * heads, -1, d)).view(b, heads, s, d)


def alibi_scaled_later(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    alibi = m.slopes.bfloat16()[:, None, None] * torch.arange(q.shape[2])
    scores = (q @ k.mT + alibi.float()[None]) * 0.25
    return finish(scores + torch.where(seen_by(causal, q), 0.0, LOWEST), v)


def alibi_up_to_the_end(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    alibi = torch.arange(1 - s, 1).view(1, 1, s) * m.slopes[:, None, None]
    scores = q @ k.mT * SCALE + alibi[:, -1:, -s:]
    return finish(scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), LOWEST).float(), v)


def alibi_of_a_column(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * SCALE + m.slopes * torch.arange(q.shape[2])), v)


def softcapped(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(torch.tanh(q @ k.mT * 0.7 / 2.5) * 2.5), v)


def multiplied_mask(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    b = m.mask[None, None, :s, :s].float()
    scores = (q @ k.mT) / math.sqrt(D)
    return finish(scores * b + -1e4 * (1 - b), v)


def window(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & (j > i - 4)), v)


def window_in_a_sum(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & (i - j < m.squares.sum().round())), v)


def window_in_a_buffer(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    return finish(torch.where(m.mask[:s, :s], q @ k.mT * SCALE, torch.tensor(LOWEST)), v)


def chunks(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & (i // 5 == j // 5)), v)


def sinks(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = masked(q @ k.mT * SCALE)
    column = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat([scores, column], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return F.softmax(both, dim=-1)[..., :-1] @ v


def zeroed_again(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    hidden = seen_by(causal, q) == torch.tensor(False)
    weights = torch.softmax((q @ k.mT * SCALE).masked_fill(hidden, -torch.inf), -1)
    return weights.masked_fill(hidden, 0.0) @ v


CAUSAL: dict[str, Any] = {"scale": SCALE, "causal": True, "window": None, "chunk": None, "softcap": None}
BAND = tril().bitwise_xor(tril().tril(-7))
SPELLINGS: list[tuple[Attend, dict[str, Any], dict[str, Tensor], int]] = [
    (eager, {}, {}, H),
    (eager_with_repeated_heads, {}, {}, 2),
    (interleaved_heads, {}, {}, 2),
    (one_kv_head_broadcast, {}, {}, 1),
    (torch_causal, {"scale": 0.3}, {}, H),
    (torch_grouped, {}, {}, 2),
    (torch_bool_mask, {}, {"mask": tril()}, H),
    (torch_added_mask, {}, {}, H),
    (torch_unmasked, {"causal": False}, {}, H),
    (filled, {}, {}, H),
    (scaled_before, {"scale": 1 / 3}, {}, H),
    (constant_tensor_scale, {"scale": 0.4}, {"scale": torch.tensor(2.5)}, H),
    (merged_with_the_batch, {}, {}, H),
    (on_a_base_of_zeros, {}, {}, H),
    (on_an_empty_base, {}, {}, H),
    (alibi_as_the_base, {"slopes": slopes()}, {"slopes": slopes()}, H),
    (alibi_scaled_later, {"slopes": slopes() / 4, "scale": 0.25}, {"slopes": slopes()}, H),
    (alibi_up_to_the_end, {"slopes": slopes()}, {"slopes": slopes()}, H),
    (alibi_of_a_column, {"slopes": slopes()}, {"slopes": slopes()[:, None, None]}, H),
    (window_in_a_sum, {"window": 7}, {"squares": torch.full((5, 5), 7 / 25)}, H),
    (softcapped, {"softcap": 2.5, "scale": 0.7}, {}, H),
    (multiplied_mask, {}, {"mask": tril()}, H),
    (window, {"window": 4}, {}, H),
    (window_in_a_buffer, {"window": 7}, {"mask": BAND}, H),
    (chunks, {"chunk": 5}, {}, H),
    (sinks, {"sinks": True}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.1])}, H),
    (zeroed_again, {}, {}, H),
]


@pytest.mark.parametrize(("attend", "says", "buffers", "kv_heads"), SPELLINGS, ids=[s[0].__name__ for s in SPELLINGS])
def test_a_spelling(attend: Attend, says: dict[str, Any], buffers: dict[str, Tensor], kv_heads: int) -> None:
    program = check_pass(MatchAttention(), Model(attend, kv_heads, **buffers), matches=1, gone=SOFTMAX)
    got = found(program)
    for name, value in (CAUSAL | {k: v for k, v in says.items() if k not in ("slopes", "sinks")}).items():
        assert got[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert (got["slopes"] is not None) == ("slopes" in says)
    if "slopes" in says:
        torch.testing.assert_close(program.weights[got["slopes"].target].evaluate(), says["slopes"])
    assert (got["sinks"] is not None) == ("sinks" in says)
    assert got["bias"] is None
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert node.args[1].meta["val"].shape[1] == kv_heads
    left = program.ops()
    assert not [
        name for name in ("arange", "tril", "triu", "le", "where", "full", "bmm", "baddbmm") if left[f"aten.{name}"]
    ]


# --- modules that don't fit Model ---


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


def test_a_single_head_without_a_dim_of_its_own() -> None:
    program = check_pass(MatchAttention(), OneHead(), matches=1, gone=SOFTMAX)
    assert found(program)["causal"]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_module(need_weights: bool, batch_first: bool) -> None:
    program = check_pass(MatchAttention(), TorchModule(need_weights, batch_first), matches=1, gone=SOFTMAX)
    assert found(program)["causal"]
    assert found(program)["scale"] == pytest.approx(SCALE)
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert node.meta["val"].shape[1] == H  # heads are heads, not rows of the batch


def test_heads_that_are_tiled_are_not_taken_for_repeated_ones() -> None:
    def attend(m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        b, heads, s, d = k.shape
        k, v = (x[:, None].expand(b, H // heads, heads, s, d).reshape(b, H, s, d) for x in (k, v))
        return eager(m, q, k, v, tokens)

    program = check_pass(MatchAttention(), Model(attend, 2), matches=1, gone=SOFTMAX)
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert node.args[1].meta["val"].shape[1] == H


def test_a_bias_that_is_no_alibi_is_handed_on() -> None:
    def attend(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        bias = F.embedding((at[:, None] - at).clamp(0, 8), m.table).permute(2, 0, 1)[None]  # [1, H, S, S]
        mask = torch.where(seen_by(causal, q), 0.0, LOWEST)
        return finish((q @ k.mT + (bias + mask)) * 0.5, v)

    table = torch.randn(9, H, generator=torch.Generator().manual_seed(0))
    program = check_pass(MatchAttention(), Model(attend, table=table), matches=1, gone=SOFTMAX | {"aten.where"})
    assert found(program)["bias"] is not None
    assert found(program)["slopes"] is None


def test_a_mask_of_positions() -> None:
    class Positional(Model):
        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            self.seen = (positions[:, None, :, None] >= positions[:, None, None, :]) & (
                positions[:, None, :, None] < positions[:, None, None, :] + 3
            )
            return super().forward(tokens, positions)

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m.seen)

    program = check_pass(MatchAttention(), Positional(attend), matches=1, gone=SOFTMAX)
    assert found(program)["window"] == 3


def test_a_wide_window_is_looked_for_as_far_as_its_number_says() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & (i - j < 100)), v)

    program = capture(Model(attend), max_seq_len=400)
    assert found(check_pass(MatchAttention(), program, matches=1))["window"] == 100


def test_a_wide_band_is_looked_for_as_far_as_its_buffer_goes() -> None:
    band = tril(400).bitwise_xor(tril(400).tril(-100))
    program = capture(Model(window_in_a_buffer, mask=band), max_seq_len=400)
    assert found(check_pass(MatchAttention(), program, matches=1))["window"] == 100


def test_weights_that_are_read_elsewhere_stay_for_that_reader() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        weights = torch.softmax(masked(q @ k.mT * SCALE), -1)
        return weights @ v + weights.amax(-1, keepdim=True)

    check_pass(MatchAttention(), Model(attend), matches=1, there={"aten.softmax", "llmc.attention"})


def test_a_scale_that_is_read_elsewhere_stays_where_it_is() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        q = q * 0.5
        return finish(masked(q @ k.mT), v) + q

    program = check_pass(MatchAttention(), Model(attend), matches=1, there={"aten.mul"})
    assert found(program)["scale"] == 1.0


def test_a_scale_for_each_head_stays_where_it_is() -> None:
    def attend(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return finish(masked((q * m.scales[:, None, None]) @ k.mT), v)

    model = Model(attend, scales=torch.tensor([0.5, 0.25, 0.3, 0.7]))
    assert found(check_pass(MatchAttention(), model, matches=1, there={"aten.mul"}))["scale"] == 1.0


def test_half_precision_with_a_wide_softmax() -> None:
    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        scores = q.float() @ k.float().mT * SCALE
        return torch.softmax(masked(scores), -1).to(v.dtype) @ v

    # The module rounds its weights to bfloat16, the op does not: 2**-9 of values of about one.
    program = check_pass(MatchAttention(), Model(attend).bfloat16(), matches=1, gone=SOFTMAX, atol=0.02)
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert {n.meta["val"].dtype for n in node.args[:3]} == {torch.bfloat16}


def test_layers_share_the_slopes() -> None:
    class Two(Model):
        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            return super().forward(tokens, positions) + super().forward(tokens + 1 - 1, positions)

    program = check_pass(MatchAttention(), Two(alibi_as_the_base, slopes=slopes()), matches=2, gone=SOFTMAX)
    assert [name for name in program.weights if "alibi" in name] == ["alibi_slopes"]


def test_fuel_stops_it() -> None:
    program = capture(Model(eager))
    assert MatchAttention()(program, Fuel(0)).matches == 0
    assert "aten.softmax" in program.ops()


# --- what is left alone ---


def over_queries(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return torch.softmax(masked(q @ k.mT * SCALE), -2) @ v


def padding(_m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    return finish((q @ k.mT * SCALE).masked_fill((tokens == 0)[:, None, None], LOWEST), v)


def padding_of_torch(_m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(tokens != 0)[:, None, None])


def content_bias(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(q @ k.mT + q @ q.mT, v)


def content_base(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    q3, k3 = (x.reshape(b * heads, s, d) for x in (q, k))
    return finish(torch.baddbmm(q3 @ q3.mT, q3, k3.mT).view(b, heads, s, s), v)


def einsum(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def einsum_of_scores(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(torch.einsum("bhqd,bhkd->bhqk", q, k), v)


def prefix(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) | (j < 3)), v)


def dilated(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & ((i - j) % 2 == 0)), v)


def late_window(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    # Causal up to length 16, a window beyond: no one rule.
    s = q.shape[2]
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & ((j > i - 4) | (torch.full((), s) <= 16))), v)


def masks_of_heads(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    seen = (at[:, None] >= at) & (at[:, None] - at < m.windows[:, None, None])
    return finish(torch.where(seen, q @ k.mT * SCALE, LOWEST), v)


def scale_of_heads(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * m.scales[:, None, None]), v)


def scale_of_tokens(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * q.mean()), v)


def scale_of_length(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT / torch.arange(1, q.shape[2] + 1).max()), v)


def negative_scale(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * -0.5), v)


def clamped(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked((q @ k.mT).clamp(min=-1.0)), v)


def rectified(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish((q @ k.mT).relu(), v)


def late_cap(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(torch.tanh(q @ k.mT + torch.arange(q.shape[2])), v)


def overwritten(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    return finish(masked(torch.where(m.mask[:s, :s], q @ k.mT, 0.0)), v)


def zeroed_where_seen(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    diagonal = seen_by(lambda i, j: i == j, q)
    return torch.softmax(masked(q @ k.mT), -1).masked_fill(diagonal, 0.0) @ v


def reweighted(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (torch.softmax(masked(q @ k.mT), -1) * 0.5) @ v


def cut_without_a_sink(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = F.pad(q @ k.mT, (0, 1))
    return torch.softmax(scores, -1)[..., :-1] @ v


def heads_before_rows(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    q, k, v = (x.transpose(0, 1).reshape(heads * b, s, d) for x in (q, k, v))
    return finish(q @ k.mT, v).view(heads, b, s, d).transpose(0, 1)


def values_of_one_head(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT), v[:, :1])


def keys_twice(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(q @ torch.cat([k, k + 1], 2).mT, torch.cat([v, v + 1], 2))


ALONE: list[tuple[Attend, str | None, dict[str, Tensor]]] = [
    (over_queries, "not over the keys", {}),
    (padding, "depends on the tokens", {}),
    (padding_of_torch, "depends on the tokens", {}),
    (content_bias, "depends on the tokens", {}),
    (content_base, "depends on the tokens", {}),
    (einsum, "einsum", {}),
    (einsum_of_scores, "not of a product", {}),
    (prefix, "neither causal", {}),
    (dilated, "neither causal", {}),
    (late_window, "another rule at another length", {}),
    (masks_of_heads, "masks of their own", {"windows": torch.tensor([2, 3, 4, 5])}),
    (scale_of_heads, "more than one number", {"scales": torch.tensor([0.5, 0.25, 0.3, 0.7])}),
    (scale_of_tokens, None, {}),
    (scale_of_length, "scale depends on the length", {}),
    (negative_scale, "not positive", {}),
    (clamped, "clamped", {}),
    (rectified, "not of a product", {}),
    (late_cap, "tanh is not the first", {}),
    (overwritten, "overwritten where a key is seen", {"mask": tril().bitwise_xor(torch.eye(32, dtype=torch.bool))}),
    (zeroed_where_seen, "seen are zeroed", {}),
    (reweighted, None, {}),
    (cut_without_a_sink, "no sink", {}),
    (heads_before_rows, "can't be told", {}),
    (values_of_one_head, "not as many heads", {}),
    (keys_twice, "not of one length", {}),
]


@pytest.mark.parametrize(("attend", "why", "buffers"), ALONE, ids=[a[0].__name__ for a in ALONE])
def test_left_alone(attend: Attend, why: str | None, buffers: dict[str, Tensor]) -> None:
    check_pass(MatchAttention(), Model(attend, **buffers), matches=0, miss=why, gone={"llmc.attention"})
