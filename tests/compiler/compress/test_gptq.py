"""GPTQ compared with its definition.

The definition inverts the Hessian of the remaining input channels at each step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.compiler.compress.gptq import gptq
from llmc.kernels.ops.quantized import levels_of
from llmc.kernels.ops.rounding import QuantizationParameters, codes_of, default_parameters

DAMPING = 0.01


def values(codes: Tensor, parameters: QuantizationParameters, scheme: str, group: int) -> Tensor:
    zeros = None if parameters.zeros is None else parameters.zeros.repeat_interleave(group, 1)
    return levels_of(codes, zeros, scheme) * parameters.spacing.repeat_interleave(group, 1)


def by_definition(
    weight: Tensor,
    hessian: Tensor,
    parameters: QuantizationParameters,
    scheme: str,
    group: int,
    keep_zeros: bool = False,
) -> np.ndarray:
    """Round in float64, one input channel at a time, as in OBS.

    The remaining channels move by -(error / inverse[0, 0]) * inverse[0].
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    order = np.argsort(-np.diag(hessian.double().numpy()), kind="stable")
    spacing = parameters.spacing.double().expand(len(w), w.shape[1] // group).numpy()
    result = np.zeros_like(w)
    for step, channel in enumerate(order):
        remaining = order[step:]
        inverse = np.linalg.inv(h[np.ix_(remaining, remaining)])
        scale, zero = spacing[:, channel // group], 8
        if parameters.zeros is not None:
            zero = parameters.zeros.numpy()[:, channel // group].astype(int)
        codes = np.rint(w[:, channel] / scale) + (zero if scheme == "int4" else 0)
        codes = np.clip(codes, 0, 15) if scheme == "int4" else np.clip(codes, -127, 127)
        if keep_zeros:
            codes = np.where(weight.numpy()[:, channel] == 0, zero if scheme == "int4" else 0, codes)
        result[:, channel] = codes
        error = w[:, channel] - (codes - (zero if scheme == "int4" else 0)) * scale
        w[:, remaining] -= np.outer(error / inverse[0, 0], inverse[0])
    return result


def inputs(channels: int, count: int = 200) -> Tensor:
    """Return correlated inputs, because only their errors can be compensated."""
    mixed = torch.randn(count, channels) @ (torch.randn(channels, channels) / channels**0.5 + 0.3)
    return mixed * torch.logspace(-1, 1, channels)[torch.randperm(channels)]


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize(
    ("scheme", "group", "symmetric"), [("int4", 16, True), ("int4", 16, False), ("int8", 32, True)]
)
def test_equals_its_definition(scheme: str, group: int, symmetric: bool, keep_zeros: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(7, 32), inputs(32)
    if keep_zeros:
        weight = weight.masked_fill(torch.rand(7, 32) < 0.5, 0)
    parameters = default_parameters(weight, scheme, group, symmetric)
    got = gptq(weight, x.T @ x, parameters, scheme, group, DAMPING, keep_zeros)
    expected = by_definition(weight, x.T @ x, parameters, scheme, group, keep_zeros)
    # A tie that is rounded the other way in float32 changes the channels after it.
    assert (got.numpy() != expected).mean() <= 0.02


def test_block_size_does_not_change_codes() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 48), inputs(48)
    parameters = default_parameters(weight, "int4", 16, True)
    one_block = gptq(weight, x.T @ x, parameters, "int4", 16)
    assert (gptq(weight, x.T @ x, parameters, "int4", 16, block=7) != one_block).float().mean() <= 0.02


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8", "fp8"])
def test_outputs_are_closer_than_with_nearest_codes(scheme: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), inputs(64, 600)
    parameters = default_parameters(weight, scheme, 16, True)

    def error(codes: Tensor) -> float:
        return float((x @ (values(codes, parameters, scheme, 16) - weight).T).square().mean())

    assert error(gptq(weight, x.T @ x, parameters, scheme, 16)) < 0.6 * error(codes_of(weight, parameters, scheme, 16))


def test_inputs_that_are_always_zero() -> None:
    """The Hessian is singular. Their weights get nearest codes, and nothing else."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 32), inputs(32)
    x[:, 3:9] = 0
    parameters = default_parameters(weight, "int4", 16, True)
    got = gptq(weight, x.T @ x, parameters, "int4", 16)
    assert torch.equal(got[:, 3:9], codes_of(weight, parameters, "int4", 16)[:, 3:9])
    assert not torch.equal(got, codes_of(weight, parameters, "int4", 16))


def test_fewer_tokens_than_channels() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 64), inputs(64, 3)
    parameters = default_parameters(weight, "int4", 16, True)
    value = values(gptq(weight, x.T @ x, parameters, "int4", 16, 1e-9), parameters, "int4", 16)
    assert torch.isfinite(value).all() and (x @ (value - weight).T).norm() < 0.5 * (x @ weight.T).norm()


@pytest.mark.parametrize(
    ("scheme", "symmetric"), [("int4", True), ("int4", False), ("nf4", True), ("int8", True), ("fp8", True)]
)
def test_pruned_weights_stay_zero_and_errors_are_compensated(scheme: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), inputs(64, 600)
    is_pruned = torch.rand(24, 64) < 0.5
    weight = weight.masked_fill(is_pruned, 0)
    parameters = default_parameters(weight, scheme, 16, symmetric)
    value = values(gptq(weight, x.T @ x, parameters, scheme, 16, keep_zeros=True), parameters, scheme, 16)
    assert (value[is_pruned] == 0).all()
    without_option = values(gptq(weight, x.T @ x, parameters, scheme, 16), parameters, scheme, 16)
    assert (without_option[is_pruned] != 0).any()
    nearest = values(codes_of(weight, parameters, scheme, 16), parameters, scheme, 16)
    assert (x @ (value - weight).T).norm() < 0.8 * (x @ (nearest - weight).T).norm()
