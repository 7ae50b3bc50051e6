"""The life of a pass: require, run, verify the result, record. A subclass writes only what it changes."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from ..errors import CompilerError, LlmcError, UsageError
from ..ir.program import Miss, PassRecord, Program, where
from ..ir.stages import Stage, verify


@dataclass(frozen=True)
class PassResult:
    """How many places were rewritten, and which near ones were left alone and why."""

    matches: int
    misses: Sequence[Miss] = field(default_factory=list)


def miss(reason: str, node: fx.Node) -> Miss:
    """`return miss("the add broadcasts", node)` from a rewrite: why it left its candidate alone."""
    return Miss(reason, node.name, where(node))


class Fuel:
    """Counts rewrites down, to find by bisection the one that breaks a program: `LLMC_FUEL=n`."""

    def __init__(self, amount: int | None = None) -> None:
        self.left = float("inf") if amount is None else amount

    @classmethod
    def from_environment(cls) -> Fuel:
        text = os.environ.get("LLMC_FUEL")
        if text is not None and not text.isdecimal():
            raise UsageError(
                "FUEL_INVALID", f"LLMC_FUEL is {text!r}, which is no number of rewrites.", "Give 0 or more."
            )
        return cls(None if text is None else int(text))

    def burn(self) -> None:
        self.left -= 1

    @property
    def empty(self) -> bool:
        return self.left <= 0


class Pass(ABC):
    """One change to a program.

    Class attributes:
        needs: the stage that a program must have reached.
        after: passes that must stand before this one in the pipeline.
        reaches: the stage that a program has reached behind it, if it is the one that leads there.
        keeps_numbers: whether the program computes what it did; False for one that is meant to change it.
    """

    needs: ClassVar[Stage] = Stage.CAPTURED
    keeps_numbers: ClassVar[bool] = True
    reaches: Stage | None = None
    after: ClassVar[tuple[type[Pass], ...]] = ()

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def run(self, program: Program, fuel: Fuel) -> PassResult:
        """Change the program in place; burn fuel for each rewrite and stop when it is empty."""

    def __call__(self, program: Program, fuel: Fuel | None = None) -> PassResult:
        """Run on a program that qualifies, verify what came out, and write it into the program's history."""
        if program.stage < self.needs:
            raise CompilerError(
                "PASS_ORDER",
                f"{self.name} needs a {self.needs} program; this one is {program.stage}.",
                "Mend the pipeline.",
            )
        start = time.perf_counter()
        result = self.run(program, fuel or Fuel())
        program.sweep()
        program.stage = max(program.stage, self.reaches or program.stage)
        try:
            verify(program)
        except LlmcError as error:
            raise LlmcError(error.code, f"After {self.name}: {error.what}", error.hint) from error
        seconds = time.perf_counter() - start
        program.history.append(PassRecord(self.name, result.matches, tuple(result.misses), seconds, program.stage))
        return result


class Rewrite(Pass):
    """A pass that looks at one node at a time.

    `rewrite` says what became of a candidate: True when it was rewritten, a `Miss` when it nearly was,
    None when it never was one. It changes the graph through `Program.replace_with` and its like.
    """

    @abstractmethod
    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None: ...

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        for node in program.nodes:
            if fuel.empty:
                break
            if node.op != "call_function" or not node.users:  # what an earlier match left without a reader
                continue
            outcome = self.rewrite(program, node)
            if isinstance(outcome, Miss):
                misses.append(outcome)
            elif outcome:
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)
