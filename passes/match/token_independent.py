"""Token-independent values: those computed from sizes, positions and weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Program, op_name
from ..queries import arguments, shape
from .partial import Evaluator

# Ops that use the shape and dtype of their tensor argument but not its values.
_USE_SHAPE_ONLY = frozenset(
    {"sym_size", "sym_numel", "empty_like", "zeros_like", "ones_like", "full_like"}
    | {"new_empty", "new_zeros", "new_ones", "new_full"}
)
# Ops that use the values of their first argument, and only the shape or dtype of the second.
_USE_FIRST_VALUES = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
_MOST_ELEMENTS = 2**27


class Unknown(Exception):
    """Raised where a match needs a value or a form that it cannot find.

    Attributes:
        why: the reason, as the text of a miss.
        node: the node that is the reason.
    """

    def __init__(self, why: str, node: fx.Node) -> None:
        super().__init__(why)
        self.why, self.node = why, node


class TokenIndependentValues:
    """The token-independent nodes of a program; `node in independent` tests for one.

    `at` evaluates them for a chosen batch and length.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: set[fx.Node] = set(program.inputs[1:])
        for node in program.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and all(n in self.nodes for n in sources(node))):
                self.nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node in self.nodes

    def at(self, batch: int, length: int) -> SizedValues:
        """An evaluator for `batch` sequences of `length` tokens that start at position 0."""
        return SizedValues(self, batch, length)

    def number(self, value: Any) -> float | None:
        """An argument as a float, or None if it is not one number.

        A node counts as one number if it has one element with the same value at every size.
        """
        if isinstance(value, (int, float)):
            return float(value)
        if value not in self or not _is_one_element(value):
            return None
        numbers = {float(self.at(*size)(value)) for size in ((2, 5), (3, 9))}
        return numbers.pop() if len(numbers) == 1 else None

    def cone(self, roots: Iterable[fx.Node]) -> set[fx.Node]:
        """The token-independent nodes that `roots` depend on, including the roots."""
        seen: set[fx.Node] = set()
        queue = list(roots)
        while queue:
            node = queue.pop()
            if node not in seen and node in self.nodes:
                seen.add(node)
                queue += sources(node)
        return seen


class SizedValues(Evaluator):
    """Evaluates token-independent nodes at one batch size and length.

    Raises `Unknown` for a value that cannot be computed or is too large.
    """

    def __init__(self, independent: TokenIndependentValues, batch: int, length: int) -> None:
        super().__init__(independent.program, torch.arange(length).expand(batch, -1))
        self.independent, self.batch, self.length = independent, batch, length
        # Tracing may name the sizes of tokens and positions differently.
        for program_input in independent.program.inputs:
            self.sizes |= dict(zip(map(str, shape(program_input)), (batch, length), strict=True))

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
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return self._size(value, node)
        if isinstance(value, Tensor):
            sizes = self.shape(node)
            if node not in self.independent:  # only its shape is used
                return torch.zeros((), dtype=value.dtype).expand(sizes)
            if torch.Size(sizes).numel() > _MOST_ELEMENTS:
                raise Unknown("a value is too large to evaluate", node)
        try:
            result = super()._compute(node)
        except (RuntimeError, IndexError):
            raise Unknown(f"it cannot be evaluated at {self.length} positions", node) from None
        if isinstance(result, Tensor) and result.is_meta:
            raise Unknown("it depends on a weight that has no value", node)
        return result


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a call depends on; for a random call, the call itself."""
    name = op_name(node).removeprefix("aten.")
    if name in _USE_SHAPE_ONLY:
        return node.all_input_nodes[1:] if node.args and isinstance(node.args[0], fx.Node) else node.all_input_nodes
    if name in _USE_FIRST_VALUES:
        return node.all_input_nodes[:1]
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return node.all_input_nodes if name == "dropout" and is_off(node) else [node]
    return node.all_input_nodes


def is_off(dropout: fx.Node) -> bool:
    """True if a dropout call drops nothing."""
    values = arguments(dropout)
    return values["train"] is False or values["p"] == 0


def _is_one_element(node: fx.Node) -> bool:
    value = value_of(node)
    return not isinstance(value, Tensor) or all(isinstance(size, int) and size == 1 for size in value.shape)
