"""Running a piece of a program on real tensors while the rest stays symbolic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program


class Evaluator:
    """Computes the value of a node from given ones.

    Weights and everything between are evaluated when first needed and kept. Batch and sequence sizes are those
    of `positions`; the value of another program input that was not given is an error.

    Args:
        positions: what the program's second input is, [B, S].
        given: values of nodes to stop at.
    """

    def __init__(self, program: Program, positions: Tensor, given: dict[fx.Node, Tensor] | None = None) -> None:
        self.program = program
        position_input = program.inputs[1]
        symbols = map(str, position_input.meta["val"].shape)
        self.sizes = dict(zip(symbols, positions.shape, strict=True))
        self.values: dict[fx.Node, Any] = {position_input: positions, **(given or {})}

    def __call__(self, node: fx.Node) -> Any:
        if node not in self.values:
            with torch.no_grad():
                self.values[node] = self._compute(node)
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if weight := self.program.weight_of(node):
            return weight.evaluate()
        if isinstance(size := node.meta["val"], torch.SymInt) and str(size) in self.sizes:
            return self.sizes[str(size)]
        if node.op != "call_function":
            raise KeyError(f"{node} was not given")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def depends_on_positions(program: Program) -> set[fx.Node]:
    """The calls that follow from positions, sizes and constants alone, whatever the tokens are."""
    positions = program.inputs[1]
    known: set[fx.Node] = {positions}
    free: set[fx.Node] = set()
    for node in program.nodes:
        if weight := program.weight_of(node):
            if weight.is_constant:
                free.add(node)
        elif node.op == "call_function":
            sources = node.all_input_nodes
            if node.target is torch.ops.aten.sym_size.int or all(n in free for n in sources):
                free.add(node)
            elif all(n in free or n in known for n in sources):
                known.add(node)
    return known - {positions}
