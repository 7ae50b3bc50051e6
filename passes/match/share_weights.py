"""One weight for one value, such as a head that is the embedding."""

from __future__ import annotations

from torch import fx

from ...ir.program import Program
from ..base import Fuel, Pass, PassResult


class ShareWeights(Pass):
    """Let weights that are the same expression of the same bytes be one.

    Example:  linear(h, w["lm_head.weight"]), where both names stand for the tensor of embedding(ids, w["embed.weight"])
    Becomes:  linear(h, w["embed.weight"])

    Left alone: 1. weights that are equal by value only: values are not read here.
    """

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        first: dict[str, fx.Node] = {}
        matches = 0
        for node in program.graph.find_nodes(op="get_attr"):
            weight = program.weight_of(node)
            assert weight is not None
            keeper = first.setdefault(weight.key, node)
            if keeper is node or fuel.empty:
                continue
            program.replace(node, keeper)
            matches += 1
            fuel.burn()
        return PassResult(matches)
