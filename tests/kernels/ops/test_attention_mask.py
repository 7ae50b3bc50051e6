"""Rules and alibi slopes are found if and only if the mask follows them."""

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


def test_a_window_of_the_whole_length_is_no_window() -> None:
    assert fit_rule(seen(MaskRule(causal=True, window=20))) == MaskRule(causal=True)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("exception", [(19, 18), (12, 3), (0, 0), (0, 19), (13, 13)])
def test_a_mask_with_one_exception_has_no_rule(rule: MaskRule, exception: tuple[int, int]) -> None:
    mask = seen(rule)
    mask[exception] = ~mask[exception]
    assert fit_rule(mask) is None


def linear_bias(slopes: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (slopes[:, None, None].to(dtype) * torch.arange(length).to(dtype)).float()


CAUSAL = seen(MaskRule(causal=True), 300)
SLOPES = torch.tensor([0.7, 0.31, 0.01])


def test_slopes_of_biases_by_key_position_and_by_distance() -> None:
    distances = SLOPES[:, None, None] * (torch.arange(300) - torch.arange(300)[:, None])
    for bias in (linear_bias(SLOPES, 300), distances, distances + torch.randn(300, 1)):
        slopes = fit_slopes(bias, CAUSAL)
        torch.testing.assert_close(slopes, SLOPES, atol=1e-5, rtol=0)
    assert is_alibi(linear_bias(SLOPES, 300), CAUSAL, SLOPES, torch.finfo(torch.float32).eps)
    assert is_alibi(distances, CAUSAL, SLOPES, torch.finfo(torch.float32).eps)


def test_the_bias_of_unseen_keys_is_ignored() -> None:
    bias = torch.where(CAUSAL, linear_bias(SLOPES, 300), torch.randn(300, 300))
    assert is_alibi(bias, CAUSAL, SLOPES, 1e-7)
    assert not is_alibi(bias, torch.ones_like(CAUSAL), SLOPES, 1e-7)


def test_slopes_are_computed_from_seen_keys() -> None:
    window = seen(MaskRule(causal=True, window=9), 300)
    bias = torch.where(window, linear_bias(SLOPES, 300), 0.0)
    torch.testing.assert_close(fit_slopes(bias, window), SLOPES, atol=1e-4, rtol=0)


def test_rounding_errors_of_the_given_precision_are_tolerated() -> None:
    bias = linear_bias(SLOPES, 300, torch.bfloat16)
    slopes = fit_slopes(bias, CAUSAL)
    assert torch.equal(slopes, SLOPES.bfloat16().float())
    assert is_alibi(bias, CAUSAL, slopes, torch.finfo(torch.bfloat16).eps)
    assert not is_alibi(bias, CAUSAL, slopes, torch.finfo(torch.float32).eps)


def test_a_nonlinear_bias_is_not_alibi() -> None:
    bias = linear_bias(SLOPES, 300) ** 1.1
    assert not is_alibi(bias, CAUSAL, fit_slopes(bias, CAUSAL), torch.finfo(torch.bfloat16).eps)


def test_the_slopes_of_a_single_position_are_zero() -> None:
    assert torch.equal(fit_slopes(torch.randn(2, 1, 1), torch.ones(1, 1, dtype=torch.bool)), torch.zeros(2))
