"""Clipped scales are never worse than plain ones, and on the grid of the kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmc.compiler.compress.clipping import best_parameters
from llmc.kernels.ops.quantized import levels_of
from llmc.kernels.ops.rounding import LARGEST_MULTIPLE, QuantizationParameters, codes_of, default_parameters

KINDS = [("int4", True), ("int4", False), ("int8", True), ("nf4", True), ("fp8", True)]


def errors(
    weight: torch.Tensor, parameters: QuantizationParameters, scheme: str, importance: torch.Tensor
) -> torch.Tensor:
    """Return the weighted squared error of each group."""
    codes = codes_of(weight, parameters, scheme, 16)
    zeros = None if parameters.zeros is None else parameters.zeros.repeat_interleave(16, 1)
    value = levels_of(codes, zeros, scheme) * parameters.spacing.repeat_interleave(16, 1)
    return ((value - weight).square() * importance).unflatten(1, (-1, 16)).sum(2)


@pytest.mark.parametrize(("scheme", "symmetric"), KINDS)
def test_no_group_is_worse_than_plain(scheme: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(40, 64), torch.rand(64) ** 4
    plain = default_parameters(weight, scheme, 16, symmetric)
    best = best_parameters(weight, importance, scheme, 16, symmetric)
    before, after = errors(weight, plain, scheme, importance), errors(weight, best, scheme, importance)
    assert (after <= before * (1 + 1e-5)).all()
    if scheme in ("int4", "nf4"):
        assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_weights_are_small_integers(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    parameters = best_parameters(weight, torch.ones(64), "int4", 16, symmetric)
    assert parameters.multiples is not None and parameters.scales.shape == (40, 1)
    assert parameters.multiples.abs().min() >= 1 and parameters.multiples.abs().max() <= LARGEST_MULTIPLE[symmetric]
    zeros = 8 if parameters.zeros is None else parameters.zeros.repeat_interleave(16, 1)
    integers = (codes_of(weight, parameters, "int4", 16).int() - zeros) * parameters.multiples.repeat_interleave(16, 1)
    assert integers.abs().max() <= 127 or (integers.min() >= -128 and integers.max() <= 127)


def test_unimportant_weights_are_clipped() -> None:
    """A large weight without importance is clipped, so the others are rounded less."""
    weight = torch.full((1, 16), 0.1)
    weight[0, ::2] = -0.13
    weight[0, 3] = 0.2
    importance = torch.ones(16)
    importance[3] = 0
    best = best_parameters(weight, importance, "int8", 16, True)
    assert best.scales[0, 0] < default_parameters(weight, "int8", 16, True).scales[0, 0]


def test_the_best_of_all_multiples_in_the_search_range() -> None:
    """Compare with every multiple, on a few groups."""
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    plain = default_parameters(weight, "int4", 16, True)
    best = best_parameters(weight, torch.ones(16), "int4", 16, True)
    assert plain.multiples is not None
    for group, multiple in itertools.product(range(6), range(9, 16)):
        for sign in (1, -1):
            other = QuantizationParameters(plain.scales, None, torch.full((6, 1), sign * multiple, dtype=torch.int8))
            measured = [errors(weight, parameters, "int4", torch.ones(16))[group, 0] for parameters in (best, other)]
            if multiple >= int(plain.multiples[group, 0].abs()) - 4:
                assert measured[0] <= measured[1] * (1 + 1e-5)
