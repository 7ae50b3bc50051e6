"""Sparsity patterns prune exactly the share, with the lowest scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc import LlmcError
from llmc.compiler.compress.sparsity import Sparsity, wanda


def scores(outputs: int = 9, inputs: int = 48) -> Tensor:
    return torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(0))


def test_two_of_four() -> None:
    is_pruned = Sparsity.parse("2:4").lowest(scores())
    assert (is_pruned.unflatten(1, (-1, 4)).sum(2) == 2).all()
    for group, pruned in zip(scores().view(-1, 4), is_pruned.view(-1, 4), strict=True):
        assert group[pruned].max() < group[~pruned].min()


@pytest.mark.parametrize(("share", "count"), [("0.5", 24), (0.25, 12), ("0.29", 14), (0.99, 48), (0.001, 0)])
def test_a_share_of_each_output_channel(share: str | float, count: int) -> None:
    """Output channels of different magnitude have the same number of zeros."""
    value = scores() * torch.logspace(-3, 3, 9)[:, None]
    is_pruned = Sparsity.parse(share).lowest(value)
    assert (is_pruned.sum(1) == count).all()
    for channel, pruned in zip(value, is_pruned, strict=True):
        assert not count or count == 48 or channel[pruned].max() < channel[~pruned].min()


def test_of_equal_scores_the_first_are_pruned() -> None:
    assert Sparsity.parse("2:4").lowest(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize("value", ["0", "1", 1.5, "-0.5", "nan", "1:4", "half", ""])
def test_invalid_patterns_are_refused(value: str | float) -> None:
    with pytest.raises(LlmcError, match="CONFIG_INVALID"):
        Sparsity.parse(value)


def test_text_of_a_pattern() -> None:
    assert [str(Sparsity.parse(value)) for value in ("2:4", "0.50", 0.3)] == ["2:4", "0.5", "0.3"]


def test_wanda_is_magnitude_times_the_norm_of_the_input() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 24), torch.randn(100, 24) * torch.logspace(-1, 1, 24)
    pruned = wanda(weight, x.square().sum(0), Sparsity(0.5))
    for before, after in zip(weight.tolist(), pruned.tolist(), strict=True):
        cost = [abs(w) * float(x[:, i].norm()) for i, w in enumerate(before)]
        lowest = sorted(range(24), key=cost.__getitem__)[:12]
        assert after == [0.0 if i in lowest else w for i, w in enumerate(before)]
