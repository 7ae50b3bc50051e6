"""Logits of the last token only, for generation needs no others."""

from __future__ import annotations

from torch import fx

from ..compiler.ir.program import Program
from ..compiler.ir.stages import Stage
from ..kernels.ops import linear, take_last
from .base import Fuel, Pass, PassResult, miss
from .match import is_call, is_op, number

# What a head may do to logits, one by one.
_ELEMENTWISE = ("mul", "div", "tanh")
_CASTS = ("to", "_to_copy")


class TakeLastToken(Pass):
    """Drop all rows but the last in front of the head, which is a fifth of a small model's prefill.

    Example:  logits = linear(h, head)            # [B, S, V]
    Becomes:  logits = linear(take_last(h), head) # [B, 1, V]

    Left alone: 1. the logits don't come from a linear by elementwise ops with numbers; 2. something else reads what
    the head computes.
    """

    needs = Stage.CANONICAL

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        node = program.output
        behind: list[fx.Node] = []
        while _is_elementwise(node) and len(node.users) == 1:
            behind.append(node)
            node = node.args[0]  # type: ignore[assignment]
        if not is_op(node, linear):
            return PassResult(0, [miss("the logits don't come from a linear by elementwise ops", node)])
        if len(node.users) > 1:
            return PassResult(0, [miss("something else reads what the head computes", node)])
        if is_op(node.args[0], take_last) or fuel.empty:
            return PassResult(0)
        with program.graph.inserting_before(node):
            last = program.call(take_last, node.args[0], like=node)
        node.replace_input_with(node.args[0], last)  # type: ignore[arg-type]
        for changed in [node, *reversed(behind)]:
            changed.meta["val"] = program.infer(changed.target, changed.args, dict(changed.kwargs))  # type: ignore[arg-type]
        fuel.burn()
        return PassResult(1)


def _is_elementwise(node: fx.Node) -> bool:
    if is_call(node, *_CASTS):
        return True
    return is_call(node, *_ELEMENTWISE) and all(number(a) is not None for a in node.args[1:2])
