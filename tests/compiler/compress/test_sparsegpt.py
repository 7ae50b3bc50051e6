"""SparseGPT against its definition: column by column, with the inverse of what is left computed anew each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.compiler.compress.sparsegpt import sparsegpt
from llmc.compiler.compress.sparsity import Sparsity, wanda

DAMPING = 0.01
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(0.5, 4)


def by_definition(weight: Tensor, hessian: Tensor, share: float, together: int) -> np.ndarray:
    """In float64. Zeros of `together` columns are chosen at the first of them: what each would cost, squared over the
    inverse's own entry among the columns not yet done; the others move by -(w / inverse[0, 0]) * inverse[0], as in OBS.
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    columns = w.shape[1]
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    inverses = [np.linalg.inv(h[i:, i:]) for i in range(columns)]
    gone = np.zeros(w.shape, bool)
    for column in range(columns):
        if column % together == 0:
            chosen = list(range(column, min(column + together, columns)))
            prices = np.stack([w[:, i] ** 2 / inverses[i][0, 0] for i in chosen], 1)
            for row, order in enumerate(np.argsort(prices, 1)):
                gone[row, [chosen[i] for i in order[: round(share * len(chosen))]]] = True
        inverse = inverses[column]
        kept = np.where(gone[:, column], 0, w[:, column])
        w[:, column:] -= np.outer((w[:, column] - kept) / inverse[0, 0], inverse[0])
        w[:, column] = kept
    return w


def inputs(columns: int, count: int = 400) -> Tensor:
    """Correlated, as what flows through a model is; without correlation there is nothing to make good."""
    mixed = torch.randn(count, columns) @ (torch.randn(columns, columns) / columns**0.5 + 0.3)
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns)]


@pytest.mark.parametrize(
    ("sparsity", "block", "together"),
    [(HALF, 128, 40), (HALF, 16, 16), (Sparsity(0.3), 16, 16), (TWO_OF_FOUR, 128, 4), (TWO_OF_FOUR, 8, 4)],
)
def test_it_is_its_definition(sparsity: Sparsity, block: int, together: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(7, 40), inputs(40)
    got = sparsegpt(weight, x.T @ x, sparsity, DAMPING, block)
    wanted = by_definition(weight, x.T @ x, sparsity.share, together)
    np.testing.assert_allclose(got.numpy(), wanted, atol=2e-3, rtol=1e-2)
    assert ((got.numpy() == 0) == (wanted == 0)).all()


@pytest.mark.parametrize("columns", [40, 256, 300])
def test_exactly_half(columns: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, columns), inputs(columns)
    before = weight.clone()
    assert ((sparsegpt(weight, x.T @ x, HALF) == 0).sum(1) == columns // 2).all()
    groups = sparsegpt(weight, x.T @ x, TWO_OF_FOUR).unflatten(1, (-1, 4))
    assert ((groups == 0).sum(2) == 2).all()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR])
def test_better_than_magnitude(sparsity: Sparsity) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 256), inputs(256, 1000)

    def error(made: Tensor) -> float:
        return float((x @ (made - weight).T).square().mean())

    plainly = error(weight.masked_fill(sparsity.lowest(weight.abs()), 0))
    by_inputs = error(wanda(weight, x.square().sum(0), sparsity))
    assert by_inputs < 0.6 * plainly
    assert error(sparsegpt(weight, x.T @ x, sparsity)) < 0.3 * by_inputs


def test_inputs_that_never_come_go_first() -> None:
    torch.manual_seed(0)
    weight, x = 100 * torch.randn(5, 32), inputs(32)
    x[:, 3:9] = 0
    got = sparsegpt(weight, x.T @ x, HALF)
    assert (got[:, 3:9] == 0).all() and ((got == 0).sum(1) == 16).all() and torch.isfinite(got).all()


def test_one_row_in_memory_is_not_overwritten() -> None:
    """A matrix of one row lies in memory as its transpose does."""
    weight = torch.randn(1, 16)
    before = weight.clone()
    sparsegpt(weight, torch.eye(16), HALF)
    assert torch.equal(weight, before)
