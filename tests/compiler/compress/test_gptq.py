"""GPTQ against its definition: column by column, with the inverse of what is left computed anew each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.compiler.compress.gptq import gptq
from llmc.kernels.ops.quantized import levels_of
from llmc.kernels.ops.rounding import GridScales, codes_of, plain_steps

DAMPING = 0.01


def values(codes: Tensor, steps: GridScales, scheme: str, group: int) -> Tensor:
    zeros = None if steps.zeros is None else steps.zeros.repeat_interleave(group, 1)
    return levels_of(codes, zeros, scheme) * steps.spacing.repeat_interleave(group, 1)


def by_definition(
    weight: Tensor, hessian: Tensor, steps: GridScales, scheme: str, group: int, keep_zeros: bool = False
) -> np.ndarray:
    """In float64. For each column the remaining ones move by -(error / inverse[0, 0]) * inverse[0], as in OBS."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    order = np.argsort(-np.diag(hessian.double().numpy()), kind="stable")
    spacing = steps.spacing.double().expand(len(w), w.shape[1] // group).numpy()
    result = np.zeros_like(w)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        step, zero = spacing[:, column // group], 8
        if steps.zeros is not None:
            zero = steps.zeros.numpy()[:, column // group].astype(int)
        codes = np.rint(w[:, column] / step) + (zero if scheme == "int4" else 0)
        codes = np.clip(codes, 0, 15) if scheme == "int4" else np.clip(codes, -127, 127)
        if keep_zeros:
            codes = np.where(weight.numpy()[:, column] == 0, zero if scheme == "int4" else 0, codes)
        result[:, column] = codes
        error = w[:, column] - (codes - (zero if scheme == "int4" else 0)) * step
        w[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
    return result


def inputs(columns: int, count: int = 200) -> Tensor:
    """Correlated, as what flows through a model is; without correlation there is nothing to make good."""
    mixed = torch.randn(count, columns) @ (torch.randn(columns, columns) / columns**0.5 + 0.3)
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns)]


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize(
    ("scheme", "group", "symmetric"), [("int4", 16, True), ("int4", 16, False), ("int8", 32, True)]
)
def test_it_is_its_definition(scheme: str, group: int, symmetric: bool, keep_zeros: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(7, 32), inputs(32)
    if keep_zeros:
        weight = weight.masked_fill(torch.rand(7, 32) < 0.5, 0)
    steps = plain_steps(weight, scheme, group, symmetric)
    got = gptq(weight, x.T @ x, steps, scheme, group, DAMPING, keep_zeros)
    wanted = by_definition(weight, x.T @ x, steps, scheme, group, keep_zeros)
    # A tie that falls the other way in float32 moves what comes behind it.
    assert (got.numpy() != wanted).mean() <= 0.02


def test_blocks_of_columns_are_no_borders() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 48), inputs(48)
    steps = plain_steps(weight, "int4", 16, True)
    whole = gptq(weight, x.T @ x, steps, "int4", 16)
    assert (gptq(weight, x.T @ x, steps, "int4", 16, block=7) != whole).float().mean() <= 0.02


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8", "fp8"])
def test_outputs_are_closer_than_by_the_nearest_codes(scheme: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), inputs(64, 600)
    steps = plain_steps(weight, scheme, 16, True)

    def error(codes: Tensor) -> float:
        return float((x @ (values(codes, steps, scheme, 16) - weight).T).square().mean())

    assert error(gptq(weight, x.T @ x, steps, scheme, 16)) < 0.6 * error(codes_of(weight, steps, scheme, 16))


def test_inputs_that_never_come() -> None:
    """Columns of zeros make the Hessian singular; their weights go to the nearest codes and help nobody."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 32), inputs(32)
    x[:, 3:9] = 0
    steps = plain_steps(weight, "int4", 16, True)
    got = gptq(weight, x.T @ x, steps, "int4", 16)
    assert torch.equal(got[:, 3:9], codes_of(weight, steps, "int4", 16)[:, 3:9])
    assert not torch.equal(got, codes_of(weight, steps, "int4", 16))


def test_fewer_inputs_than_columns() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 64), inputs(64, 3)
    steps = plain_steps(weight, "int4", 16, True)
    value = values(gptq(weight, x.T @ x, steps, "int4", 16, 1e-9), steps, "int4", 16)
    assert torch.isfinite(value).all() and (x @ (value - weight).T).norm() < 0.5 * (x @ weight.T).norm()


@pytest.mark.parametrize(
    ("scheme", "symmetric"), [("int4", True), ("int4", False), ("nf4", True), ("int8", True), ("fp8", True)]
)
def test_zeros_of_a_pruned_weight_stay_and_are_made_good(scheme: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), inputs(64, 600)
    gone = torch.rand(24, 64) < 0.5
    weight = weight.masked_fill(gone, 0)
    steps = plain_steps(weight, scheme, 16, symmetric)
    value = values(gptq(weight, x.T @ x, steps, scheme, 16, keep_zeros=True), steps, scheme, 16)
    assert (value[gone] == 0).all()
    assert (values(gptq(weight, x.T @ x, steps, scheme, 16), steps, scheme, 16)[gone] != 0).any(), "it would move them"
    plainly = values(codes_of(weight, steps, scheme, 16), steps, scheme, 16)
    assert (x @ (value - weight).T).norm() < 0.8 * (x @ (plainly - weight).T).norm()
