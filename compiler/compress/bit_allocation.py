"""Which roundings to do without: those that cost most for what they save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A weight on few bits that could have more, or one whose inputs are rounded and could be left as they are.

    Attributes:
        loss: the divergence that its rounding causes, in nats a token.
        numbers: how many it has; each that is spared the rounding costs the same.
    """

    name: str
    loss: float
    numbers: int


def by_worth(losses: Mapping[str, float], numbers: Mapping[str, int]) -> list[Candidate]:
    """The weights, those first that are worth their bytes most; of equals the first by name."""
    found = [Candidate(name, loss, numbers[name]) for name, loss in losses.items()]
    return sorted(found, key=lambda one: (-one.loss / one.numbers, one.name))


def spare_until(candidates: Sequence[Candidate], target: float, share: float = 1.0) -> list[str]:
    """The fewest of the candidates, in their order, without which the losses of the others stay under a target.

    Args:
        share: of all numbers, how many may be spared at most.
    """
    left = sum(one.loss for one in candidates)
    room = share * sum(one.numbers for one in candidates)
    spared: list[str] = []
    for one in candidates:
        if left <= target:
            break
        if one.numbers <= room:
            spared.append(one.name)
            room -= one.numbers
            left -= one.loss
    return spared
