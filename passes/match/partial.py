"""Evaluate single nodes of a program on real tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Program


class Evaluator:
    """Computes the value of any node from positions, weights and given values.

    Values, including those of weights, are computed on first use and kept. The sizes of batch and sequence are those
    of `positions`. A node that depends on any other program input raises a KeyError unless `given` covers it.

    Args:
        positions: value of the program's second input, [B, S].
        given: known values of further nodes; evaluation does not look at what they are computed from.
    """

    def __init__(self, program: Program, positions: Tensor, given: dict[fx.Node, Tensor] | None = None) -> None:
        self.program = program
        position_input = program.positions
        symbols = map(str, value_of(position_input).shape)
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
        if isinstance(size := value_of(node), torch.SymInt) and str(size) in self.sizes:
            return self.sizes[str(size)]
        if node.op != "call_function":
            raise KeyError(f"no value was given for the input {node}")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def depends_on_positions(program: Program) -> set[fx.Node]:
    """The calls that depend on positions, and otherwise only on sizes and constants.

    Calls that depend on sizes and constants alone are not included.
    """
    positions = program.positions
    positional: set[fx.Node] = {positions}
    fixed: set[fx.Node] = set()
    for node in program.nodes:
        if weight := program.weight_of(node):
            if weight.is_constant:
                fixed.add(node)
        elif node.op == "call_function":
            sources = node.all_input_nodes
            if node.target is torch.ops.aten.sym_size.int or all(n in fixed for n in sources):
                fixed.add(node)
            elif all(n in fixed or n in positional for n in sources):
                positional.add(node)
    return positional - {positions}
