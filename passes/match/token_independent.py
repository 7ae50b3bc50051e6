"""Values that don't depend on what the tokens are: sizes, positions and constants, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program, op_name
from ..queries import arguments, shape
from .partial import Evaluator

# Ops that read the shape and dtype of their tensor argument and none of its values.
_OF_SHAPE = frozenset(
    {"sym_size", "sym_numel", "empty_like", "zeros_like", "ones_like", "full_like"}
    | {"new_empty", "new_zeros", "new_ones", "new_full"}
)
# Ops that read the values of their first argument and the shape or dtype of the second.
_OF_FIRST = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
_MOST_ELEMENTS = 2**27


class Unknown(Exception):
    """A value that can't be had, why, and the node that is to blame."""

    def __init__(self, why: str, node: fx.Node) -> None:
        super().__init__(why)
        self.why, self.node = why, node


class Statics:
    """The nodes of a program whose values are the same for all tokens, and these values for sizes of our choice."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: set[fx.Node] = set(program.inputs[1:])
        for node in program.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and all(n in self.nodes for n in sources(node))):
                self.nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node in self.nodes

    def at(self, batch: int, length: int) -> SizedValues:
        """Evaluates nodes for rows that start at position 0."""
        return SizedValues(self, batch, length)

    def number(self, value: Any) -> float | None:
        """The one number that an argument is at every size, if it is one."""
        if isinstance(value, (int, float)):
            return float(value)
        if value not in self or not _is_one_element(value):
            return None
        found = {float(self.at(*size)(value)) for size in ((2, 5), (3, 9))}
        return found.pop() if len(found) == 1 else None

    def cone(self, roots: Iterable[fx.Node]) -> set[fx.Node]:
        """All nodes that the values of `roots` follow from."""
        found: set[fx.Node] = set()
        queue = list(roots)
        while queue:
            node = queue.pop()
            if node not in found and node in self.nodes:
                found.add(node)
                queue += sources(node)
        return found


class SizedValues(Evaluator):
    """The values of static nodes at one batch and length."""

    def __init__(self, statics: Statics, batch: int, length: int) -> None:
        super().__init__(statics.program, torch.arange(length).expand(batch, -1))
        self.statics, self.batch, self.length = statics, batch, length
        for given in statics.program.inputs:  # tracing may name the sizes of tokens and positions differently
            self.sizes |= dict(zip(map(str, shape(given)), (batch, length), strict=True))

    def shape(self, node: fx.Node) -> list[int]:
        return [self._size(size, node) for size in shape(node)]

    def _size(self, size: Any, node: fx.Node) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if any(str(s) not in self.sizes for s in expression.free_symbols):
            raise Unknown("a size depends on the values of tensors", node)
        return int(expression.subs({s: self.sizes[str(s)] for s in expression.free_symbols}))

    def _compute(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return self._size(value, node)
        if isinstance(value, Tensor):
            sizes = self.shape(node)
            if node not in self.statics:  # read for its shape alone
                return torch.zeros((), dtype=value.dtype).expand(sizes)
            if torch.Size(sizes).numel() > _MOST_ELEMENTS:
                raise Unknown("a value is too large to be looked into", node)
        try:
            result = super()._compute(node)
        except (RuntimeError, IndexError):
            raise Unknown(f"it has no value at {self.length} positions", node) from None
        if isinstance(result, Tensor) and result.is_meta:
            raise Unknown("a weight without a value takes part", node)
        return result


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a call's value follows from; the call itself where it draws lots."""
    name = op_name(node).removeprefix("aten.")
    if name in _OF_SHAPE:
        return node.all_input_nodes[1:] if node.args and isinstance(node.args[0], fx.Node) else node.all_input_nodes
    if name in _OF_FIRST:
        return node.all_input_nodes[:1]
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return node.all_input_nodes if name == "dropout" and is_off(node) else [node]
    return node.all_input_nodes


def is_off(dropout: fx.Node) -> bool:
    """Whether a dropout drops nothing."""
    found = arguments(dropout)
    return found["train"] is False or found["p"] == 0


def _is_one_element(node: fx.Node) -> bool:
    value = node.meta["val"]
    return not isinstance(value, Tensor) or all(isinstance(size, int) and size == 1 for size in value.shape)
