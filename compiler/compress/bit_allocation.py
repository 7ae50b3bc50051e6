"""Choose which weights get more bits: those whose rounding costs most per byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A weight that could get more bits, or whose inputs could stay unrounded.

    Attributes:
        name: the weight's name.
        loss: the divergence that its rounding causes, in nats per token.
        numbers: its number of elements. Sparing one element costs the same in all candidates.
    """

    name: str
    loss: float
    numbers: int


def by_sensitivity(losses: Mapping[str, float], numbers: Mapping[str, int]) -> list[Candidate]:
    """Sort weights by loss per element, largest first, then by name.

    Args:
        losses: loss of each weight, by name.
        numbers: number of elements of each weight, by name.
    """
    candidates = [Candidate(name, loss, numbers[name]) for name, loss in losses.items()]
    return sorted(candidates, key=lambda candidate: (-candidate.loss / candidate.numbers, candidate.name))


def choose_until(candidates: Sequence[Candidate], target: float, share: float = 1.0) -> list[str]:
    """Spare candidates in order until the other ones lose at most `target` in total.

    Returns the names of the spared candidates. A candidate that exceeds what is left of the budget is skipped.

    Args:
        target: the largest sum of the losses of all candidates that are not spared.
        share: the budget: the largest share of all elements that may be spared.
    """
    loss = sum(candidate.loss for candidate in candidates)
    budget = share * sum(candidate.numbers for candidate in candidates)
    spared: list[str] = []
    for candidate in candidates:
        if loss <= target:
            break
        if candidate.numbers <= budget:
            spared.append(candidate.name)
            budget -= candidate.numbers
            loss -= candidate.loss
    return spared
