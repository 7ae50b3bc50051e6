"""How many numbers of a matrix become zero, and which: the lowest of some scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import LlmcError


@dataclass(frozen=True)
class Sparsity:
    """A pattern of zeros.

    Attributes:
        share: how many of the numbers become zero.
        group: consecutive inputs each of which loses that share by itself; None: any of a row may go.
    """

    share: float
    group: int | None = None

    @classmethod
    def parse(cls, given: str | float) -> Sparsity:
        """What `--prune` says: "2:4", or a share between 0 and 1.

        Raises:
            LlmcError: CONFIG_INVALID for anything else.
        """
        if given == "2:4":
            return cls(0.5, 4)
        try:
            share = float(given)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise LlmcError(
                "CONFIG_INVALID",
                f"Prune is {given!r}.",
                "Give 2:4, or the share of zeros: a number above 0 and below 1.",
            )
        return cls(share)

    def __str__(self) -> str:
        return "2:4" if self.group else f"{self.share:g}"

    def lowest(self, scores: Tensor) -> Tensor:
        """Where the scores [O, I] are lowest: exactly this share of each row, or group of it; of equals the first."""
        size = self.group or scores.shape[1]
        groups = scores.unflatten(1, (-1, size))
        found = groups.argsort(dim=2, stable=True)[:, :, : round(self.share * size)]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, found, True).flatten(1)


def wanda(weight: Tensor, squares: Tensor, sparsity: Sparsity) -> Tensor:
    """The weight [O, I] with zeros where its magnitude times the norm of its input is lowest, all else as it was.

    (Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024.)

    Args:
        squares: of each input, summed over the text, [I].
    """
    return weight.float().masked_fill(sparsity.lowest(weight.float().abs() * squares.sqrt()), 0.0)
