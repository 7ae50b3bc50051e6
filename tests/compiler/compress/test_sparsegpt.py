"""SparseGPT compared with its definition.

The definition inverts the Hessian of the remaining input channels at each step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.compiler.compress.sparsegpt import sparsegpt
from llmc.compiler.compress.sparsity import Sparsity, wanda

DAMPING = 0.01
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(0.5, 4)


def by_definition(weight: Tensor, hessian: Tensor, share: float, size: int) -> np.ndarray:
    """Prune in float64, choosing zeros of `size` channels at the first of them.

    A zero costs w^2 / inverse[0, 0], where the inverse is of the channels from its own to the last. The remaining
    channels move by -(w / inverse[0, 0]) * inverse[0], as in OBS.
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    channels = w.shape[1]
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    inverses = [np.linalg.inv(h[i:, i:]) for i in range(channels)]
    is_zero = np.zeros(w.shape, bool)
    for channel in range(channels):
        if channel % size == 0:
            block = list(range(channel, min(channel + size, channels)))
            costs = np.stack([w[:, i] ** 2 / inverses[i][0, 0] for i in block], 1)
            for output, order in enumerate(np.argsort(costs, 1)):
                is_zero[output, [block[i] for i in order[: round(share * len(block))]]] = True
        inverse = inverses[channel]
        kept = np.where(is_zero[:, channel], 0, w[:, channel])
        w[:, channel:] -= np.outer((w[:, channel] - kept) / inverse[0, 0], inverse[0])
        w[:, channel] = kept
    return w


def inputs(channels: int, count: int = 400) -> Tensor:
    """Return correlated inputs, because only their errors can be compensated."""
    mixed = torch.randn(count, channels) @ (torch.randn(channels, channels) / channels**0.5 + 0.3)
    return mixed * torch.logspace(-1, 1, channels)[torch.randperm(channels)]


@pytest.mark.parametrize(
    ("sparsity", "block", "size"),
    [(HALF, 128, 40), (HALF, 16, 16), (Sparsity(0.3), 16, 16), (TWO_OF_FOUR, 128, 4), (TWO_OF_FOUR, 8, 4)],
)
def test_equals_its_definition(sparsity: Sparsity, block: int, size: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(7, 40), inputs(40)
    got = sparsegpt(weight, x.T @ x, sparsity, DAMPING, block)
    expected = by_definition(weight, x.T @ x, sparsity.share, size)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3, rtol=1e-2)
    assert ((got.numpy() == 0) == (expected == 0)).all()


@pytest.mark.parametrize("channels", [40, 256, 300])
def test_exactly_half(channels: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, channels), inputs(channels)
    before = weight.clone()
    assert ((sparsegpt(weight, x.T @ x, HALF) == 0).sum(1) == channels // 2).all()
    groups = sparsegpt(weight, x.T @ x, TWO_OF_FOUR).unflatten(1, (-1, 4))
    assert ((groups == 0).sum(2) == 2).all()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR])
def test_better_than_magnitude(sparsity: Sparsity) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 256), inputs(256, 1000)

    def error(pruned: Tensor) -> float:
        return float((x @ (pruned - weight).T).square().mean())

    by_magnitude = error(weight.masked_fill(sparsity.lowest(weight.abs()), 0))
    by_inputs = error(wanda(weight, x.square().sum(0), sparsity))
    assert by_inputs < 0.6 * by_magnitude
    assert error(sparsegpt(weight, x.T @ x, sparsity)) < 0.3 * by_inputs


def test_weights_of_zero_inputs_are_pruned_first() -> None:
    torch.manual_seed(0)
    weight, x = 100 * torch.randn(5, 32), inputs(32)
    x[:, 3:9] = 0
    got = sparsegpt(weight, x.T @ x, HALF)
    assert (got[:, 3:9] == 0).all() and ((got == 0).sum(1) == 16).all() and torch.isfinite(got).all()


def test_one_output_channel_is_not_overwritten() -> None:
    """A weight with one output channel has the same memory layout as its transpose."""
    weight = torch.randn(1, 16)
    before = weight.clone()
    sparsegpt(weight, torch.eye(16), HALF)
    assert torch.equal(weight, before)
