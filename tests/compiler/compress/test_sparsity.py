"""Which numbers go: exactly as many as asked, where they were asked for, the lowest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc import LlmcError
from llmc.compiler.compress.sparsity import Sparsity, wanda


def scores(rows: int = 9, columns: int = 48) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))


def test_two_of_four() -> None:
    gone = Sparsity.parse("2:4").lowest(scores())
    assert (gone.unflatten(1, (-1, 4)).sum(2) == 2).all()
    for group, lost in zip(scores().view(-1, 4), gone.view(-1, 4), strict=True):
        assert group[lost].max() < group[~lost].min()


@pytest.mark.parametrize(("share", "count"), [("0.5", 24), (0.25, 12), ("0.29", 14), (0.99, 48), (0.001, 0)])
def test_a_share_of_each_row(share: str | float, count: int) -> None:
    """Rows of different size lose the same: the rows' outputs are compared with nobody's."""
    given = scores() * torch.logspace(-3, 3, 9)[:, None]
    gone = Sparsity.parse(share).lowest(given)
    assert (gone.sum(1) == count).all()
    for row, lost in zip(given, gone, strict=True):
        assert not count or count == 48 or row[lost].max() < row[~lost].min()


def test_of_equals_the_first() -> None:
    assert Sparsity.parse("2:4").lowest(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize("given", ["0", "1", 1.5, "-0.5", "nan", "1:4", "half", ""])
def test_what_is_no_pattern(given: str | float) -> None:
    with pytest.raises(LlmcError, match="CONFIG_INVALID"):
        Sparsity.parse(given)


def test_words() -> None:
    assert [str(Sparsity.parse(given)) for given in ("2:4", "0.50", 0.3)] == ["2:4", "0.5", "0.3"]


def test_wanda_is_magnitude_times_the_norm_of_the_input() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 24), torch.randn(100, 24) * torch.logspace(-1, 1, 24)
    made = wanda(weight, x.square().sum(0), Sparsity(0.5))
    for row, got in zip(weight.tolist(), made.tolist(), strict=True):
        price = [abs(w) * float(x[:, i].norm()) for i, w in enumerate(row)]
        cheapest = sorted(range(24), key=price.__getitem__)[:12]
        assert got == [0.0 if i in cheapest else w for i, w in enumerate(row)]
