"""One layer of a network while it is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Call:
    """A layer and the values that it reads.

    Attributes:
        layer: TensorRT's layer, recast to the interface of its type.
        name: as TensorRT calls it, with its type.
        inputs: None for an input that is omitted.
        outputs: TensorRT's tensors.
        constants: the values of constants that TensorRT does not return, by name.
    """

    layer: Any
    name: str
    inputs: Sequence[np.ndarray | None]
    outputs: Sequence[Any]
    constants: Mapping[str, np.ndarray]

    def input(self, index: int) -> np.ndarray:
        """Return an input that must be there."""
        value = self.optional(index)
        if value is None:
            raise ValueError(f"input {index} is missing")
        return value

    def optional(self, index: int) -> np.ndarray | None:
        """Return an input, or None if it is omitted."""
        return self.inputs[index] if index < len(self.inputs) else None

    def refuse(self, what: str) -> NotImplementedError:
        """Return the error for a form of the layer that the interpreter does not cover."""
        return NotImplementedError(f"The interpreter does not cover {what}, in {self.name}.")


Values = np.ndarray | tuple[np.ndarray, ...]
Evaluate = Callable[[Call], Values]
"""Computes the values of a layer's outputs, before they are rounded to the dtypes of the outputs."""


def axes_of(mask: int, rank: int) -> tuple[int, ...]:
    """Return the axes of a bit mask."""
    return tuple(axis for axis in range(rank) if mask >> axis & 1)


def along(axis: int, rank: int) -> list[int]:
    """Return the shape that places the elements of a vector along an axis of `rank` dimensions."""
    return [-1 if d == axis else 1 for d in range(rank)]


def integers(value: np.ndarray) -> list[int]:
    """Return the elements of a shape tensor, whatever its rank."""
    return [int(x) for x in value.reshape(-1)]
