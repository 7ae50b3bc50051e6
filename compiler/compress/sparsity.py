"""Sparsity patterns, and pruning by the lowest scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import parse_sparsity


@dataclass(frozen=True)
class Sparsity:
    """A pattern of zeros.

    Attributes:
        share: the share of weights that become zero.
        group: number of consecutive input channels in which this share becomes zero; None: it becomes zero in each
            output channel as a whole.
    """

    share: float
    group: int | None = None

    @classmethod
    def parse(cls, given: str | float) -> Sparsity:
        """Parse the value of `--prune`: "2:4", or a share between 0 and 1.

        Raises:
            LlmcError: CONFIG_INVALID for anything else.
        """
        return cls(*parse_sparsity(given))

    def __str__(self) -> str:
        return "2:4" if self.group else f"{self.share:g}"

    def lowest(self, scores: Tensor) -> Tensor:
        """Return a mask [O, I] of the lowest scores in each group or output channel.

        The mask covers exactly the share. Of equal scores, the first ones count as lower.
        """
        size = self.group or scores.shape[1]
        groups = scores.unflatten(1, (-1, size))
        lowest = groups.argsort(dim=2, stable=True)[:, :, : round(self.share * size)]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, lowest, True).flatten(1)


def wanda(weight: Tensor, squares: Tensor, sparsity: Sparsity) -> Tensor:
    """Set weights to zero where magnitude times norm of the input is lowest.

    All other weights stay as they are. (Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
    2024.)

    Args:
        weight: [O, I].
        squares: the sum of squares of each input channel over the text, [I].
    """
    return weight.float().masked_fill(sparsity.lowest(weight.float().abs() * squares.sqrt()), 0.0)
