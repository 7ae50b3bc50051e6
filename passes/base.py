"""The lifecycle of a pass: require a stage, run, verify the result, record it. A subclass writes only the change."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from torch import fx

from ..errors import CompilerError, LlmcError, UsageError
from ..ir.program import Miss, PassRecord, Program, where
from ..ir.stages import Stage, verify


class Numerics(Enum):
    """How a pass may change the numbers that a program computes; the gate's bisection holds each pass to it."""

    EXACT = "exact"
    """The same numbers, but for the order of floating-point sums."""
    QUANTIZES_INPUTS = "quantizes inputs"
    """Inputs of linears, or keys and values, are quantized, or no longer."""
    LOSSY = "lossy"
    """Weights or layers change by design."""


@dataclass(frozen=True)
class PassResult:
    """How many places were rewritten, and which near ones were left alone and why."""

    matches: int
    misses: Sequence[Miss] = field(default_factory=list)


def miss(reason: str, node: fx.Node) -> Miss:
    """Return why a rewrite leaves its candidate alone: `return miss("the add broadcasts", node)`."""
    return Miss(reason, node.name, where(node))


class Fuel:
    """The number of rewrites that are still allowed. `LLMC_FUEL=n` finds the rewrite that breaks a program."""

    def __init__(self, amount: int | None = None) -> None:
        self.amount = amount
        self.left = float("inf") if amount is None else amount

    @classmethod
    def from_environment(cls) -> Fuel:
        """Read LLMC_FUEL; without it fuel never runs out."""
        text = os.environ.get("LLMC_FUEL")
        if text is not None and not text.isdecimal():
            raise UsageError(
                "FUEL_INVALID", f"LLMC_FUEL is {text!r}, not a number of rewrites.", "Set it to 0 or more."
            )
        return cls(None if text is None else int(text))

    def burn(self) -> None:
        """Use up one rewrite."""
        self.left -= 1

    @property
    def empty(self) -> bool:
        """True when no rewrite is allowed any more."""
        return self.left <= 0

    def copy(self) -> Fuel:
        """Return a tank with the same amount left."""
        same = Fuel(self.amount)
        same.left = self.left
        return same


class Pass(ABC):
    """One change to a program.

    Class attributes:
        needs: the stage that a program must have reached.
        after: passes that must come before this one in the pipeline.
        reaches: the stage that a program has reached after this pass, if this pass leads there.
        numerics: how the pass may change what the program computes.
    """

    needs: ClassVar[Stage] = Stage.CAPTURED
    numerics: Numerics = Numerics.EXACT
    reaches: Stage | None = None
    after: ClassVar[tuple[type[Pass], ...]] = ()

    @property
    def name(self) -> str:
        """The name in histories, dumps and messages."""
        return type(self).__name__

    @abstractmethod
    def run(self, program: Program, fuel: Fuel) -> PassResult:
        """Change the program in place; burn fuel for each rewrite and stop when it is empty."""

    def __call__(self, program: Program, fuel: Fuel | None = None) -> PassResult:
        """Run on a program that qualifies, verify the result, and record it in the program's history."""
        if program.stage < self.needs:
            raise CompilerError(
                "PASS_ORDER",
                f"{self.name} needs a program that is {self.needs}, but this one is {program.stage}.",
                "Reorder the list of passes.",
            )
        start = time.perf_counter()
        result = self.run(program, fuel or Fuel())
        program.sweep()
        program.stage = max(program.stage, self.reaches or program.stage)
        try:
            verify(program)
        except LlmcError as error:
            raise type(error)(error.code, f"After {self.name}: {error.what}", error.hint) from error
        seconds = time.perf_counter() - start
        program.history.append(PassRecord(self.name, result.matches, tuple(result.misses), seconds, program.stage))
        return result


class Reach(Pass):
    """Declare a stage reached; the verifier then holds the program to the stage's spec."""

    def __init__(self, stage: Stage) -> None:
        self.stage = self.reaches = stage

    @property
    def name(self) -> str:
        return f"Reach({self.stage})"

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        return PassResult(0)


class Rewrite(Pass):
    """A pass that looks at one node at a time.

    `rewrite` returns what became of a candidate: True if it was rewritten, a `Miss` if it nearly matched,
    None if it is no candidate. It changes the graph through `Program.replace_with` and similar methods.
    """

    @abstractmethod
    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        """Rewrite the node, or return why not."""

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        for node in program.nodes:
            if fuel.empty:
                break
            if node.op != "call_function" or not node.users:  # an earlier match may have left it without users
                continue
            outcome = self.rewrite(program, node)
            if isinstance(outcome, Miss):
                misses.append(outcome)
            elif outcome:
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)
