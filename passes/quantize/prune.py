"""Replace weights of linears by pruned ones, and list which can be pruned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ...ir.program import Program
from ...ir.stages import Stage
from ...ir.stored import stored_codes
from ...ir.weights import Weight
from ...kernels.ops import linear
from ..base import Fuel, Numerics, Pass, PassResult, miss
from ..queries import is_op
from .quantization_plan import is_head


class Prune(Pass):
    """Replace the weights of linears by pruned weights.

    Example:  y = linear(x, w)
    Becomes:  y = linear(x, w), where half of w is zero

    The graph stays the same; only the weights change. Run this pass before quantization, which keeps the zeros.

    Left alone: 1. weights without a pruned version.

    Args:
        weights: pruned weights of the same shape and dtype, by the name of the weight that each replaces.
        unpruned: the reasons why other weights are not pruned, by their names.
    """

    needs = Stage.OPTIMIZED
    numerics = Numerics.LOSSY

    def __init__(self, weights: Mapping[str, Weight], unpruned: Mapping[str, str] | None = None) -> None:
        self.weights = weights
        self.unpruned = unpruned or {}

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        for node in program.nodes:
            name = str(getattr(node.args[1], "target", "")) if is_op(node, linear) else ""
            if reason := self.unpruned.get(name):
                misses.append(miss(reason, node))
            if name not in self.weights or self.weights[name] is program.weights[name] or fuel.empty:
                continue
            program.weights[name] = self.weights[name]
            matches += 1
            fuel.burn()
        return PassResult(matches, misses)


def prunable(program: Program, group: int | None) -> dict[str, str]:
    """Return why each linear's weight cannot be pruned, by name; "" if it can.

    The weights are in the order in which the program uses them.

    Args:
        group: number of input channels that are pruned as a group; None if there are no groups.
    """
    reasons: dict[str, str] = {}
    for node in program.graph.nodes:
        if not is_op(node, linear):
            continue
        operand = node.args[1]
        weight = program.weight_of(operand)
        if weight is not None and not weight.is_constant:
            assert isinstance(operand, fx.Node)
            reasons[str(operand.target)] = _why_not_prunable(program, operand, weight, group)
    return reasons


def _why_not_prunable(program: Program, operand: fx.Node, weight: Weight, group: int | None) -> str:
    if others := [user for user in operand.users if not is_op(user, linear)]:
        return f"{others[0].name} reads it too"
    if any(is_head(program, user) for user in operand.users):
        return "it is the head"
    if stored_codes(weight) is not None:
        return "the checkpoint holds it as codes"
    if group and weight.shape[1] % group:
        return f"its {weight.shape[1]} inputs don't divide into groups of {group}"
    return ""
