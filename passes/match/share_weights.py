"""Merge weights with the same value, such as an LM head tied to the embedding."""

from __future__ import annotations

from torch import fx

from ...ir.program import Program
from ..base import Fuel, Pass, PassResult


class ShareWeights(Pass):
    """Merge weights that are the same expression over the same bytes.

    Example:  linear(h, w["lm_head.weight"]) and embedding(ids, w["embed.weight"]), where both weights are one tensor
    Becomes:  linear(h, w["embed.weight"]) and embedding(ids, w["embed.weight"])

    Left alone: 1. weights that are equal by value only. The pass reads no values.
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
