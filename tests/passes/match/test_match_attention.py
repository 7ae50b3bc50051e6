"""Every spelling of attention becomes one op with the right arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import (
    LOWEST,
    SCALE,
    SOFTMAX,
    Attend,
    D,
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
from check_pass import check_pass
from torch import Tensor

from llmc.kernels.ops import attention
from llmc.passes.match.match_attention import MatchAttention

# --- spellings: (attend, expected arguments of the op, buffers, heads of k and v) ---


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


def masked_fill(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(D)
    return finish(scores.masked_fill(~seen_by(causal, q), -torch.inf), v)


def scaled_queries_and_keys(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
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


def alibi_scaled_later(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    alibi = m.slopes.bfloat16()[:, None, None] * torch.arange(q.shape[2])
    scores = (q @ k.mT + alibi.float()[None]) * 0.25
    return finish(scores + torch.where(seen_by(causal, q), 0.0, LOWEST), v)


def alibi_counted_from_the_last_key(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    alibi = torch.arange(1 - s, 1).view(1, 1, s) * m.slopes[:, None, None]
    scores = q @ k.mT * SCALE + alibi[:, -1:, -s:]
    return finish(scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), LOWEST).float(), v)


def alibi_by_key_position(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
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


def chunks(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & (i // 5 == j // 5)), v)


def sinks(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = masked(q @ k.mT * SCALE)
    column = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat([scores, column], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return F.softmax(both, dim=-1)[..., :-1] @ v


def weights_zeroed_after_softmax(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
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
    (masked_fill, {}, {}, H),
    (scaled_queries_and_keys, {"scale": 1 / 3}, {}, H),
    (constant_tensor_scale, {"scale": 0.4}, {"scale": torch.tensor(2.5)}, H),
    (merged_with_the_batch, {}, {}, H),
    (on_a_base_of_zeros, {}, {}, H),
    (on_an_empty_base, {}, {}, H),
    (alibi_as_the_base, {"slopes": slopes()}, {"slopes": slopes()}, H),
    (alibi_scaled_later, {"slopes": slopes() / 4, "scale": 0.25}, {"slopes": slopes()}, H),
    (alibi_counted_from_the_last_key, {"slopes": slopes()}, {"slopes": slopes()}, H),
    (alibi_by_key_position, {"slopes": slopes()}, {"slopes": slopes()[:, None, None]}, H),
    (window_in_a_sum, {"window": 7}, {"squares": torch.full((5, 5), 7 / 25)}, H),
    (softcapped, {"softcap": 2.5, "scale": 0.7}, {}, H),
    (multiplied_mask, {}, {"mask": tril()}, H),
    (window, {"window": 4}, {}, H),
    (window_in_a_buffer, {"window": 7}, {"mask": BAND}, H),
    (chunks, {"chunk": 5}, {}, H),
    (sinks, {"sinks": True}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.1])}, H),
    (weights_zeroed_after_softmax, {}, {}, H),
]


@pytest.mark.parametrize(
    ("attend", "expected", "buffers", "kv_heads"), SPELLINGS, ids=[s[0].__name__ for s in SPELLINGS]
)
def test_a_spelling_becomes_the_op(
    attend: Attend, expected: dict[str, Any], buffers: dict[str, Tensor], kv_heads: int
) -> None:
    program = check_pass(MatchAttention(), Model(attend, kv_heads, **buffers), matches=1, gone=SOFTMAX)
    actual = attention_arguments(program)
    for name, value in (CAUSAL | {k: v for k, v in expected.items() if k not in ("slopes", "sinks")}).items():
        assert actual[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert (actual["slopes"] is not None) == ("slopes" in expected)
    if "slopes" in expected:
        torch.testing.assert_close(program.weights[actual["slopes"].target].evaluate(), expected["slopes"])
    assert (actual["sinks"] is not None) == ("sinks" in expected)
    assert actual["bias"] is None
    (node,) = (n for n in program.nodes if n.target is attention.overload)
    assert node.args[1].meta["val"].shape[1] == kv_heads
    ops = program.ops()
    assert not [
        name for name in ("arange", "tril", "triu", "le", "where", "full", "bmm", "baddbmm") if ops[f"aten.{name}"]
    ]
