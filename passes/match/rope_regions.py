"""Find the parts of a graph that multiply and add one value with tables: the candidates for rotations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Program, op_name
from ...kernels.ops import embedding
from ..queries import dtype, is_op, shape

# Rotations are spelled with these ops only. They are linear in the rotated value if only tables multiply it.
_LINEAR = frozenset(
    f"aten.{name}"
    for name in """
    mul add sub neg cat stack slice select split split_with_sizes chunk unbind view reshape flatten unflatten unsqueeze
    squeeze transpose permute expand contiguous clone to _to_copy type_as view_as_complex view_as_real flip roll
    complex real imag
    """.split()
) | {"getitem"}


class Regions:
    """Parts of the graph that combine one value with looked-up tables linearly.

    Attributes:
        tables: lookups by position in constant tables, and views of them.
        mixed: calls that are linear in one value and combine it with tables, in graph order.
    """

    def __init__(self, program: Program) -> None:
        self.index = {node: i for i, node in enumerate(program.nodes)}
        positions = program.positions
        self.tables: set[fx.Node] = set()
        self.mixed: list[fx.Node] = []
        mixed: set[fx.Node] = set()
        for node in program.nodes:
            if is_op(node, embedding):
                weight = program.weight_of(node.args[1])
                if node.args[0] is positions and weight is not None and weight.is_constant:
                    self.tables.add(node)
            elif op_name(node) in _LINEAR:
                sources = [n for n in node.all_input_nodes if not _is_size(n)]
                if sources and all(n in self.tables for n in sources):
                    self.tables.add(node)
                elif self._is_linear(node) and any(n in self.tables or n in mixed for n in sources):
                    mixed.add(node)
                    self.mixed.append(node)

    def _is_linear(self, node: fx.Node) -> bool:
        factors = [n for n in node.all_input_nodes if not _is_size(n) and n not in self.tables]
        return op_name(node) in _LINEAR and (op_name(node) != "aten.mul" or len(factors) == 1)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n not in self.tables and not _is_size(n)]

    def starts(self, end: fx.Node) -> Iterator[fx.Node]:
        """The possible inputs of a rotation that ends at `end`, nearest first.

        Everything that `end` depends on, except tables, passes through each of them. They have the shape and dtype of
        `end`.
        """
        region: set[fx.Node] = set()
        queue = [end]
        while queue:
            node = queue.pop()
            if node not in region:
                region.add(node)
                if self._is_linear(node):
                    queue += self._inputs(node)
        order = sorted(region, key=self.index.__getitem__)
        # The earliest place that the nodes visited so far read. If it is just before `node`, all paths pass through it.
        reaches_back = len(order)
        place = {node: i for i, node in enumerate(order)}
        for i in range(len(order) - 1, 0, -1):
            node = order[i]
            inputs = self._inputs(node) if self._is_linear(node) else []
            if not inputs:
                return  # a second input, so nothing before it can be the only one
            reaches_back = min(reaches_back, *(place[n] for n in inputs))
            before = order[i - 1]
            if reaches_back == i - 1 and isinstance(value_of(before), Tensor) and _kind(before) == _kind(end):
                yield before

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The calls between `start` and `end`, `end` included, in graph order."""
        calls: set[fx.Node] = set()
        queue = [end]
        while queue:
            node = queue.pop()
            if node not in calls and node is not start:
                calls.add(node)
                queue += self._inputs(node)
        return sorted(calls, key=self.index.__getitem__)

    def lookups(self, region: list[fx.Node]) -> list[fx.Node]:
        """The table lookups that a region uses and the views between, in graph order."""
        calls: set[fx.Node] = set()
        queue = [n for node in region for n in node.all_input_nodes if n in self.tables]
        while queue:
            node = queue.pop()
            if node not in calls:
                calls.add(node)
                queue += [n for n in node.all_input_nodes if n in self.tables]
        return sorted(calls, key=self.index.__getitem__)


def sizes(node: fx.Node) -> list[str]:
    """The sizes of a value as texts, so that symbolic ones can be compared."""
    return [str(size) for size in shape(node)]


def _is_size(node: fx.Node) -> bool:
    return not isinstance(value_of(node), (Tensor, list, tuple))


def _kind(node: fx.Node) -> tuple[list[str], torch.dtype]:
    return sizes(node), dtype(node)
