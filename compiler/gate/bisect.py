"""Which pass broke a program, and in which layer: what is asked when the gate refuses an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program, layer_of, where
from ...passes.base import Fuel, Pass

# Values of each node that are kept to compare; a mistake rarely spares all of them.
_SAMPLES = 512


@dataclass(frozen=True)
class FaultyPass:
    """The first pass behind which a program is not what it was, and the first node that shows it."""

    step: str
    place: str
    error: float

    def __str__(self) -> str:
        return f"{self.step} is the first to change the result (error {self.error:.2g}), first seen in {self.place}"


def find_faulty_pass(program: Program, passes: Sequence[Pass], tokens: Tensor, limit: float) -> FaultyPass | None:
    """Run passes one by one and compare what each makes with what it was given; None if all keep the numbers.

    One that is meant to change them is not compared.

    Args:
        program: before the first of the passes; it is changed.
        tokens: [B, S] to run it on.
        limit: of the error that a pass may make, relative to the spread of the logits.
    """
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    before = _watch(program, tokens, positions)
    fuel = Fuel.from_environment()
    for subject in passes:
        if not subject(program, fuel).matches:
            continue
        after = _watch(program, tokens, positions)
        error = _error(before.logits, after.logits)
        if subject.keeps_numbers and not error <= limit:  # NaN is not
            return FaultyPass(subject.name, _first_difference(before, after, limit), error)
        before = after
    return None


@dataclass(frozen=True)
class _Run:
    """The logits of a run, and a few values of every node, in order."""

    logits: Tensor
    samples: dict[str, tuple[str, Tensor]]


class _Watcher(fx.Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.program = program
        self.samples: dict[str, tuple[str, Tensor]] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self.program.weights[target].evaluate()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            flat = value.detach().flatten()
            place = where(n) or layer_of(n) or n.name
            self.samples[n.name] = place, flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].clone()
        return value


def _watch(program: Program, tokens: Tensor, positions: Tensor) -> _Run:
    watcher = _Watcher(program)
    with torch.no_grad():
        (logits, *_) = watcher.run(tokens, positions)
    return _Run(logits, watcher.samples)


def _first_difference(before: _Run, after: _Run, limit: float) -> str:
    """The module of the first node that both programs have and that gives other numbers now."""
    for name, (place, value) in after.samples.items():
        known = before.samples.get(name)
        if known is not None and known[1].shape == value.shape and not _error(known[1], value) <= limit:
            return place
    return "the output"


def _error(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, relative to the spread of the first."""
    if one.shape != other.shape:
        return float("inf")
    spread = (one.double() - one.double().mean()).square().mean().sqrt().clamp(min=1e-30)
    return float((one.double() - other.double()).square().mean().sqrt() / spread)
