"""Logits of the rows that the caller asks for, and no others."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ...ir.program import Program
from ...ir.stages import Stage
from ...kernels.ops import linear, quant_linear, take_rows
from ..base import Fuel, Pass, PassResult, miss
from ..queries import is_call, is_op, number

# What a head may do to logits, one by one.
_ELEMENTWISE = ("mul", "div", "tanh")
_CASTS = ("to", "_to_copy")


class SelectLogits(Pass):
    """Drop the rows that nobody reads in front of the head, which is a fifth of a small model's prefill.

    Example:  logits = linear(h, head)                  # [B, S, V]
    Becomes:  logits = linear(take_rows(h, rows), head) # [B, R, V], with a new input rows [R]

    Left alone: 1. the logits don't come from a linear by elementwise ops with numbers; 2. something else reads what
    the head computes.
    """

    needs = Stage.CACHED

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        node = program.output
        behind: list[fx.Node] = []
        while _is_elementwise(node) and len(node.users) == 1:
            behind.append(node)
            node = node.args[0]  # type: ignore[assignment]
        if not (is_op(node, linear) or is_op(node, quant_linear)):
            return PassResult(0, [miss("the logits don't come from a linear by elementwise ops", node)])
        if len(node.users) > 1:
            return PassResult(0, [miss("something else reads what the head computes", node)])
        if is_op(node.args[0], take_rows) or fuel.empty:
            return PassResult(0)
        rows = self._input(program)
        with program.graph.inserting_before(node):
            taken = program.call(take_rows, node.args[0], rows, like=node)
        node.replace_input_with(node.args[0], taken)  # type: ignore[arg-type]
        for changed in [node, *reversed(behind)]:
            changed.meta["val"] = program.infer(changed.target, changed.args, dict(changed.kwargs))  # type: ignore[arg-type]
        fuel.burn()
        return PassResult(1)

    @staticmethod
    def _input(program: Program) -> fx.Node:
        mode = program.fake_mode
        # A size of its own: as many rows as the caller asks for.
        sizes: StatelessSymbolicContext = StatelessSymbolicContext([DimDynamic.DYNAMIC])
        value = mode.from_tensor(torch.empty(3, dtype=torch.int64), symbolic_context=sizes)
        return program.add_input("rows", value, after=program.inputs[1])


def _is_elementwise(node: fx.Node) -> bool:
    if is_call(node, *_CASTS):
        return True
    return is_call(node, *_ELEMENTWISE) and all(number(a) is not None for a in node.args[1:2])
