"""A rule is found where there is one, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.kernels.ops.attention_mask import MaskRule, fit_rule, fit_slopes, is_alibi

RULES = [
    MaskRule(causal=True),
    MaskRule(causal=False),
    MaskRule(causal=True, window=1),
    MaskRule(causal=True, window=2),
    MaskRule(causal=True, window=7),
    MaskRule(causal=True, window=19),
    MaskRule(causal=True, chunk=2),
    MaskRule(causal=True, chunk=7),
    MaskRule(causal=False, chunk=7),
    MaskRule(causal=False, window=7),
]


def seen(rule: MaskRule, length: int = 20) -> Tensor:
    return rule.sees(torch.arange(length), torch.arange(length))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_found(rule: MaskRule) -> None:
    assert fit_rule(seen(rule)) == rule


def test_a_window_beyond_the_length_is_none() -> None:
    assert fit_rule(seen(MaskRule(causal=True, window=20))) == MaskRule(causal=True)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("place", [(19, 18), (12, 3), (0, 0), (0, 19), (13, 13)])
def test_one_exception_makes_it_no_rule(rule: MaskRule, place: tuple[int, int]) -> None:
    mask = seen(rule)
    mask[place] = ~mask[place]
    assert fit_rule(mask) is None


def linear(slopes: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (slopes[:, None, None].to(dtype) * torch.arange(length).to(dtype)).float()


CAUSAL = seen(MaskRule(causal=True), 300)
SLOPES = torch.tensor([0.7, 0.31, 0.01])


def test_slopes_of_key_positions_and_of_distances() -> None:
    distances = SLOPES[:, None, None] * (torch.arange(300) - torch.arange(300)[:, None])
    for bias in (linear(SLOPES, 300), distances, distances + torch.randn(300, 1)):
        found = fit_slopes(bias, CAUSAL)
        torch.testing.assert_close(found, SLOPES, atol=1e-5, rtol=0)
    assert is_alibi(linear(SLOPES, 300), CAUSAL, SLOPES, torch.finfo(torch.float32).eps)
    assert is_alibi(distances, CAUSAL, SLOPES, torch.finfo(torch.float32).eps)


def test_what_is_not_seen_may_be_anything() -> None:
    bias = torch.where(CAUSAL, linear(SLOPES, 300), torch.randn(300, 300))
    assert is_alibi(bias, CAUSAL, SLOPES, 1e-7)
    assert not is_alibi(bias, torch.ones_like(CAUSAL), SLOPES, 1e-7)


def test_slopes_come_from_keys_that_are_seen() -> None:
    window = seen(MaskRule(causal=True, window=9), 300)
    bias = torch.where(window, linear(SLOPES, 300), 0.0)
    torch.testing.assert_close(fit_slopes(bias, window), SLOPES, atol=1e-4, rtol=0)


def test_rounding_counts_in_the_precision_it_happened_in() -> None:
    bias = linear(SLOPES, 300, torch.bfloat16)
    slopes = fit_slopes(bias, CAUSAL)
    assert torch.equal(slopes, SLOPES.bfloat16().float())
    assert is_alibi(bias, CAUSAL, slopes, torch.finfo(torch.bfloat16).eps)
    assert not is_alibi(bias, CAUSAL, slopes, torch.finfo(torch.float32).eps)


def test_a_curve_is_no_alibi() -> None:
    bias = linear(SLOPES, 300) ** 1.1
    assert not is_alibi(bias, CAUSAL, fit_slopes(bias, CAUSAL), torch.finfo(torch.bfloat16).eps)


def test_one_position_has_no_slope() -> None:
    assert torch.equal(fit_slopes(torch.randn(2, 1, 1), torch.ones(1, 1, dtype=torch.bool)), torch.zeros(2))
