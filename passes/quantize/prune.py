"""Weights with zeros in the place of those that were, and which weights of a program can have them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ...ir.program import Program
from ...ir.stages import Stage
from ...ir.stored import stored_codes
from ...ir.weights import Weight
from ...kernels.ops import linear
from ..base import Fuel, Pass, PassResult, miss
from ..queries import is_op
from .rounding_plan import is_head


class Prune(Pass):
    """Let linears read pruned weights.

    Example:  y = linear(x, w)
    Becomes:  y = linear(x, w), where half of w is zero

    The graph stays: a name stands for other numbers. Before quantization, which rounds what is there, and keeps zeros.

    Left alone: 1. whatever no pruned weight was made for.

    Args:
        weights: by the name of what they replace, of its shape and dtype.
        whole: why weights of other linears stay, by name.
    """

    needs = Stage.OPTIMIZED
    keeps_numbers = False

    def __init__(self, weights: Mapping[str, Weight], whole: Mapping[str, str] | None = None) -> None:
        self.weights = weights
        self.whole = whole or {}

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        for node in program.nodes:
            name = str(getattr(node.args[1], "target", "")) if is_op(node, linear) else ""
            if reason := self.whole.get(name):
                misses.append(miss(reason, node))
            if name not in self.weights or self.weights[name] is program.weights[name] or fuel.empty:
                continue
            program.weights[name] = self.weights[name]
            matches += 1
            fuel.burn()
        return PassResult(matches, misses)


def prunable(program: Program, group: int | None) -> dict[str, str]:
    """The weights of linears in the order in which they are read, and why each must stay; empty where it need not.

    Args:
        group: inputs that are pruned together, None for any number.
    """
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if not is_op(node, linear):
            continue
        read = node.args[1]
        weight = program.weight_of(read)
        if weight is not None and not weight.is_constant:
            assert isinstance(read, fx.Node)
            found[str(read.target)] = _why_whole(program, read, weight, group)
    return found


def _why_whole(program: Program, read: fx.Node, weight: Weight, group: int | None) -> str:
    if others := [user for user in read.users if not is_op(user, linear)]:
        return f"{others[0].name} reads it too"
    if any(is_head(program, user) for user in read.users):
        return "it is the head"
    if stored_codes(weight) is not None:
        return "the checkpoint holds it as codes"
    if group and weight.shape[1] % group:
        return f"its {weight.shape[1]} inputs don't divide into groups of {group}"
    return ""
