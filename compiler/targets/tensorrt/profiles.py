"""Optimization profiles: the smallest, usual and largest shapes of the inputs in each phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....runtimes.engines.tensorrt.section import PROFILES, Profile
from .network import Network, checked

Range = tuple[int, int, int]
"""Smallest, usual and largest size."""


@dataclass(frozen=True)
class Shapes:
    """The ranges of the dynamic dimensions in one profile."""

    name: str
    batch: Range
    tokens: Range
    rows: Range

    def of_input(self, name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the three shapes of an input of the network."""
        ranges = {"input_ids": (self.batch, self.tokens), "rows": (self.rows,)}.get(name, (self.batch,))
        sizes = [ranges[axis] if size == -1 else (size,) * 3 for axis, size in enumerate(shape)]
        return [tuple(size[which] for size in sizes) for which in range(3)]


def shapes_of(profiles: Mapping[str, Profile]) -> list[Shapes]:
    """Return the ranges of each profile, in the plan's order.

    A call may ask for the logits of all its tokens; usually it asks for one. For decode steps of a single sequence
    only, TensorRT would multiply a vector, for which it expands 8-bit weights to 16 bits in memory.
    """
    return [
        Shapes(name, (1, 1, one.batch), (1, one.tokens, one.tokens), (1, 1, one.tokens))
        for name, one in ((name, profiles[name]) for name in PROFILES)
    ]


def add_profiles(network: Network, config: Any, shapes: list[Shapes]) -> None:
    """Add an optimization profile for each of the ranges to a builder's config."""
    definition = network.definition
    for one in shapes:
        profile = network.builder.create_optimization_profile()
        for index in range(definition.num_inputs):
            tensor = definition.get_input(index)
            profile.set_shape(tensor.name, *one.of_input(tensor.name, tuple(tensor.shape)))
        checked(None if config.add_optimization_profile(profile) < 0 else profile, "optimization profile")
