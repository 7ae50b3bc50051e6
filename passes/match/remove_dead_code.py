"""Remove calls and weights that nothing uses."""

from __future__ import annotations

from ...ir.program import Program
from ..base import Fuel, Pass, PassResult


class RemoveDeadCode(Pass):
    """Remove calls and weights that the program's outputs do not depend on.

    Example:  y = x + 1;  z = x * 2;  return y
    Becomes:  y = x + 1;  return y

    Left alone: 1. the program's inputs, used or not.
    """

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        return PassResult(program.sweep())
