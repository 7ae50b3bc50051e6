"""MatchAttention leaves calls alone that only look like attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import LOWEST, SCALE, Attend, Model, finish, masked, seen_by, tril
from check_pass import check_pass
from torch import Tensor

from llmc.passes.match.match_attention import MatchAttention


def over_queries(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return torch.softmax(masked(q @ k.mT * SCALE), -2) @ v


def padding(_m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    return finish((q @ k.mT * SCALE).masked_fill((tokens == 0)[:, None, None], LOWEST), v)


def padding_in_torch_attention(_m: Model, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(tokens != 0)[:, None, None])


def token_dependent_bias(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(q @ k.mT + q @ q.mT, v)


def token_dependent_baddbmm_input(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
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


def window_for_long_sequences(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    # Causal up to length 16, a window for longer sequences.
    s = q.shape[2]
    return finish(masked(q @ k.mT * SCALE, lambda i, j: (j <= i) & ((j > i - 4) | (torch.full((), s) <= 16))), v)


def mask_per_head(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    seen = (at[:, None] >= at) & (at[:, None] - at < m.windows[:, None, None])
    return finish(torch.where(seen, q @ k.mT * SCALE, LOWEST), v)


def scale_per_head(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * m.scales[:, None, None]), v)


def scale_from_tokens(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * q.mean()), v)


def scale_from_length(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT / torch.arange(1, q.shape[2] + 1).max()), v)


def negative_scale(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT * -0.5), v)


def clamped(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked((q @ k.mT).clamp(min=-1.0)), v)


def rectified(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish((q @ k.mT).relu(), v)


def tanh_after_bias(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(torch.tanh(q @ k.mT + torch.arange(q.shape[2])), v)


def overwritten(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    s = q.shape[2]
    return finish(masked(torch.where(m.mask[:s, :s], q @ k.mT, 0.0)), v)


def visible_weights_zeroed(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    diagonal = seen_by(lambda i, j: i == j, q)
    return torch.softmax(masked(q @ k.mT), -1).masked_fill(diagonal, 0.0) @ v


def reweighted(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (torch.softmax(masked(q @ k.mT), -1) * 0.5) @ v


def extra_column_without_sink(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = F.pad(q @ k.mT, (0, 1))
    return torch.softmax(scores, -1)[..., :-1] @ v


def heads_before_batch(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, heads, s, d = q.shape
    q, k, v = (x.transpose(0, 1).reshape(heads * b, s, d) for x in (q, k, v))
    return finish(q @ k.mT, v).view(heads, b, s, d).transpose(0, 1)


def values_of_one_head(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(masked(q @ k.mT), v[:, :1])


def more_keys_than_queries(_m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return finish(q @ torch.cat([k, k + 1], 2).mT, torch.cat([v, v + 1], 2))


ALONE: list[tuple[Attend, str | None, dict[str, Tensor]]] = [
    (over_queries, "not over the keys", {}),
    (padding, "depends on the tokens", {}),
    (padding_in_torch_attention, "depends on the tokens", {}),
    (token_dependent_bias, "depends on the tokens", {}),
    (token_dependent_baddbmm_input, "depends on the tokens", {}),
    (einsum, "einsum", {}),
    (einsum_of_scores, "does not read a product", {}),
    (prefix, "neither causal", {}),
    (dilated, "neither causal", {}),
    (window_for_long_sequences, "different rules at different lengths", {}),
    (mask_per_head, "mask differs between", {"windows": torch.tensor([2, 3, 4, 5])}),
    (scale_per_head, "more than one number", {"scales": torch.tensor([0.5, 0.25, 0.3, 0.7])}),
    (scale_from_tokens, None, {}),
    (scale_from_length, "scale depends on the length", {}),
    (negative_scale, "not positive", {}),
    (clamped, "clamped", {}),
    (rectified, "does not read a product", {}),
    (tanh_after_bias, "before the tanh", {}),
    (
        overwritten,
        "although its key is seen",
        {"mask": tril().bitwise_xor(torch.eye(32, dtype=torch.bool))},
    ),
    (visible_weights_zeroed, "visible keys are set to zero", {}),
    (reweighted, None, {}),
    (extra_column_without_sink, "not one sink per head", {}),
    (heads_before_batch, "unknown order", {}),
    (values_of_one_head, "different numbers of heads", {}),
    (more_keys_than_queries, "differ in length", {}),
]


@pytest.mark.parametrize(("attend", "why", "buffers"), ALONE, ids=[a[0].__name__ for a in ALONE])
def test_left_alone(attend: Attend, why: str | None, buffers: dict[str, Tensor]) -> None:
    check_pass(MatchAttention(), Model(attend, **buffers), matches=0, miss=why, gone={"llmc.attention"})
