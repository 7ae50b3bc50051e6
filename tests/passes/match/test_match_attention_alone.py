"""What looks like attention and is something else is left alone, with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import LOWEST, SCALE, Attend, Model, finish, masked, seen_by, tril
from check_pass import check_pass
from torch import Tensor

from llmc.passes.match.match_attention import MatchAttention

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
    (einsum_of_scores, "does not read a product", {}),
    (prefix, "neither causal", {}),
    (dilated, "neither causal", {}),
    (late_window, "different rules at different lengths", {}),
    (masks_of_heads, "mask differs between", {"windows": torch.tensor([2, 3, 4, 5])}),
    (scale_of_heads, "more than one number", {"scales": torch.tensor([0.5, 0.25, 0.3, 0.7])}),
    (scale_of_tokens, None, {}),
    (scale_of_length, "scale depends on the length", {}),
    (negative_scale, "not positive", {}),
    (clamped, "clamped", {}),
    (rectified, "does not read a product", {}),
    (late_cap, "before the tanh", {}),
    (
        overwritten,
        "overwritten although its key is seen",
        {"mask": tril().bitwise_xor(torch.eye(32, dtype=torch.bool))},
    ),
    (zeroed_where_seen, "visible keys are set to zero", {}),
    (reweighted, None, {}),
    (cut_without_a_sink, "not one sink per head", {}),
    (heads_before_rows, "unknown order", {}),
    (values_of_one_head, "different numbers of heads", {}),
    (keys_twice, "differ in length", {}),
]


@pytest.mark.parametrize(("attend", "why", "buffers"), ALONE, ids=[a[0].__name__ for a in ALONE])
def test_left_alone(attend: Attend, why: str | None, buffers: dict[str, Tensor]) -> None:
    check_pass(MatchAttention(), Model(attend, **buffers), matches=0, miss=why, gone={"llmc.attention"})
