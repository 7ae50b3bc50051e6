"""Queries about graph nodes that several passes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import fx

from ..ir.nodes import value_of
from ..ir.program import op_name
from ..kernels.ops.op import Op, op_of

_CASTS = frozenset({"to", "_to_copy", "type_as", "float"})


def is_call(node: object, *names: str) -> TypeGuard[fx.Node]:
    """True if `node` calls one of these ATen ops.

    Ops are named without namespace and overload: `is_call(n, "add", "sub")`.
    """
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in {f"aten.{n}" for n in names}


def is_op(node: object, op: Op) -> TypeGuard[fx.Node]:
    """True if `node` calls this op of the dialect."""
    return isinstance(node, fx.Node) and op_of(node.target) is op


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, with defaults filled in.

    The call is to an ATen op or to an op of the dialect.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for position, parameter in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            found[parameter.name] = node.kwargs[parameter.name]
        else:
            found[parameter.name] = parameter.default_value
    return found


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of the node's value: ints for static dims, SymInts for dynamic ones."""
    return tuple(value_of(node).shape)


def dtype(node: fx.Node) -> torch.dtype:
    return value_of(node).dtype


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """True if two values have the same sizes.

    Symbolic sizes are compared by name, so no guard is added.
    """
    return [str(x) for x in shape(a)] == [str(x) for x in shape(b)]


def operands(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The two operands of a call in both orders, for commutative ops."""
    a, b = node.args[0], node.args[1]
    yield a, b
    yield b, a


def number(value: object) -> float | None:
    """A scalar argument as a float, or None if it is not a Python number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def behind_casts(node: Any) -> Any:
    """The first node above a chain of casts; `node` itself if it is no cast."""
    while is_call(node, *_CASTS):
        node = node.args[0]
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's user if there is exactly one, otherwise None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def past_casts(node: fx.Node) -> fx.Node:
    """The end of the chain of casts after `node`; `node` itself if there is none.

    Each value before the end of the chain has only the next cast as its user.
    """
    while (user := only_user(node)) is not None and is_call(user, *_CASTS):
        node = user
    return node


def behind_widening(node: Any) -> Any:
    """The first node above a chain of widening casts; `node` itself if it is none.

    The result holds exactly the same values, in the same or a narrower floating point dtype.
    """
    while is_call(node, *_CASTS):
        inner, outer = dtype(node.args[0]), dtype(node)  # type: ignore[arg-type]
        if not inner.is_floating_point or torch.promote_types(inner, outer) != outer:
            break
        node = node.args[0]
    return node


def rounded_to(node: fx.Node, wanted: torch.dtype) -> fx.Node | None:
    """The last node of dtype `wanted` among `node` and the casts after it, or None.

    Each value before the end of the chain has only the next cast as its user.
    """
    found = node if dtype(node) == wanted else None
    while (user := only_user(node)) is not None and is_call(user, *_CASTS):
        node = user
        found = node if dtype(node) == wanted else found
    return found
