"""Replace alternative names of ATen ops by one name."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.program import Program
from ..base import Rewrite

aten = torch.ops.aten

# Both names of a pair have the same overloads. A test compares their schemas.
NAMES = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "subtract": "sub",
    "true_divide": "div",
}


class UnifyOpNames(Rewrite):
    """Call each op by the name that the other passes match.

    Example:  y = multiply(x, 2.0);  z = concat([x, y], -1)
    Becomes:  y = mul(x, 2.0);  z = cat([x, y], -1)

    Left alone: 1. a call that differs in more than its name.
    """

    def rewrite(self, program: Program, node: fx.Node) -> bool | None:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return None
        name = NAMES.get(target._schema.name.removeprefix("aten::"))
        if name is None:
            return None
        node.target = getattr(getattr(aten, name), target._overloadname)
        return True
