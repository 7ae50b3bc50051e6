"""Parts of spelled-out norms: division by a root, mean square, scale and shift."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...ir.weights import Call
from ..base import miss
from ..queries import (
    arguments,
    behind_casts,
    behind_widening,
    dtype,
    is_call,
    number,
    only_user,
    operands,
    past_casts,
    rounded_to,
    same_shape,
    shape,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Division:
    """`numerator / sqrt(power + eps)`."""

    numerator: fx.Node
    power: fx.Node
    eps: float


def divisions(node: fx.Node) -> Iterator[Division | Miss]:
    """All ways to read `node` as a division by a root, and near misses.

    Both orders of a product and all spellings of the root are tried.
    """
    if is_call(node, "mul"):
        pairs = [(a, _under_inverse_root(behind_casts(b)), b) for a, b in operands(node)]
    elif is_call(node, "div") and not node.kwargs:
        numerator, denominator = node.args
        pairs = [(numerator, _under_root(behind_casts(denominator)), denominator)]
    else:
        return
    for numerator, radicand, denominator in pairs:
        if not isinstance(numerator, fx.Node):
            continue
        if isinstance(radicand, fx.Node):
            power, eps = _without_eps(radicand)
            if is_call(power, "add") and any(isinstance(mean_of(a), fx.Node) for a in power.all_input_nodes):
                yield miss("eps is not a number", power)
            else:
                yield Division(numerator, power, eps)
        elif is_call(denominator, "add") and any(_under_root(behind_casts(a)) for a, _ in operands(denominator)):
            yield miss("eps is added to the root, not under it", denominator)


def mean_square(node: fx.Node) -> fx.Node | Miss | None:
    """Find the value whose mean square over the last dim is `node`.

    Returns a miss for a near match, and None if `node` is nothing of the kind.
    """
    summed = mean_of(node)
    if not isinstance(summed, fx.Node):
        return summed
    squared = behind_casts(summed)
    if is_call(squared, "square") or (is_call(squared, "pow") and number(squared.args[1]) == 2):
        return squared.args[0]  # type: ignore[return-value]
    if is_call(squared, "mul") and squared.args[0] is squared.args[1]:
        return squared.args[0]  # type: ignore[return-value]
    return None


def mean_of(node: fx.Node) -> fx.Node | Miss | None:
    """Find the value whose mean over the last dim, kept with size 1, is `node`.

    Returns a miss for a near match, and None if `node` is nothing of the kind.
    """
    node = behind_casts(node)
    if is_call(node, "mean"):
        reduction = node
    elif scaled := _scaled(node, "sum"):
        reduction, factor = scaled
        width = shape(reduction.args[0])[-1]  # type: ignore[arg-type]
        if not isinstance(width, int) or not math.isclose(factor * width, 1, rel_tol=1e-6):
            return miss("the sum is not divided by the width, so it is no mean", reduction)
    elif is_call(node, "sum"):
        return miss("the sum is not divided by the width, so it is no mean", node)
    else:
        return None
    values = arguments(reduction)
    if not over_last_dim(values["self"], values.get("dim"), values.get("keepdim")):
        return miss("it does not reduce the last dim alone with keepdim", reduction)
    return values["self"]


def over_last_dim(x: fx.Node, dims: object, keepdim: object) -> bool:
    """True if a reduction of `x` over `dims` reduces only the last and keeps it."""
    last = value_of(x).dim() - 1
    return isinstance(dims, (list, tuple)) and [d % (last + 1) for d in dims] == [last] and keepdim is True


def length_over_root_width(node: fx.Node) -> fx.Node | None:
    """Find the value whose vector norm, divided by the root of its width, is `node`.

    That quotient is the root mean square over the last dim. Returns None if `node` is no such quotient.
    """
    scaled = _scaled(behind_casts(node), "linalg_vector_norm")
    if scaled is None:
        return None
    norm, factor = scaled
    values = arguments(norm)
    width = shape(values["self"])[-1]
    if values["ord"] != 2 or not over_last_dim(values["self"], values["dim"], values["keepdim"]):
        return None
    return values["self"] if isinstance(width, int) and math.isclose(factor * width**0.5, 1, rel_tol=1e-6) else None


def same_value(a: fx.Node, b: fx.Node) -> bool:
    """True if two nodes hold the same numbers, possibly one of them in a wider dtype."""
    return behind_widening(a) is behind_widening(b)


@dataclass(frozen=True)
class Affine:
    """The scale and shift after a normed value.

    Attributes:
        end: the last of these calls; the normed value if there are none.
    """

    end: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None


def affine(program: Program, normed: fx.Node, shifts: bool) -> Affine:
    """Find the scale and shift after `normed`.

    Each must be computed from weights alone and have one value per position of the last dim.

    Args:
        shifts: also look for a shift.
    """
    end, weight, bias = normed, None, None
    value = past_casts(normed)
    user = only_user(value)
    if is_call(user, "mul") and (weight := _vector_beside(program, user, value)):
        end, value = user, past_casts(user)
        user = only_user(value)
    if shifts and is_call(user, "add") and not user.kwargs and (bias := _vector_beside(program, user, value)):
        end = user
    return Affine(end, weight, bias)


def place(end: fx.Node, readings: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node] | None:
    """Choose the input of a norm op and the node to replace, by dtype.

    The op keeps the dtype of its input. Of `readings`, which hold the input before and after its casts, the first whose
    dtype fits is chosen. A cast up before the norm and a cast down after it are then replaced together with it.
    """
    for x in readings:
        if replaced := rounded_to(end, dtype(x)):
            return x, replaced
    return None


def _vector_beside(program: Program, node: fx.Node, normed: fx.Node) -> fx.Node | None:
    """The other operand of `node` if it is a parameter vector over the last dim."""
    width = shape(normed)[-1]
    if not same_shape(node, normed) or not isinstance(width, int):
        return None
    for value, other in operands(node):
        other = behind_widening(other)
        if value is not normed or not isinstance(other, fx.Node):
            continue
        if shape(other) == (width,):
            return other if _from_weights(other) else None
        weight = program.weight_of(other)
        if weight and weight.numel == width and weight.shape[-1] == width:
            flat = Call(aten.reshape.default, (weight, [width]))
            return program.add_weight(f"{other.target}_reshape", flat, like=node)
    return None


def _from_weights(node: fx.Node) -> bool:
    """True for a weight, or a value computed from weights and numbers alone."""
    seen, sources = set(), [node]
    while sources:
        source = sources.pop()
        if source.op == "placeholder":
            return False
        if source not in seen:
            seen.add(source)
            sources += source.all_input_nodes
    return any(source.op == "get_attr" for source in seen)


def _under_root(node: object) -> fx.Node | None:
    """The value whose square root is `node`, or None."""
    if is_call(node, "sqrt") or (is_call(node, "pow") and number(node.args[1]) == 0.5):
        return node.args[0]  # type: ignore[return-value]
    return None


def _under_inverse_root(node: object) -> fx.Node | None:
    """The value whose inverse square root is `node`, or None."""
    if is_call(node, "rsqrt") or (is_call(node, "pow") and number(node.args[1]) == -0.5):
        return node.args[0]  # type: ignore[return-value]
    if is_call(node, "reciprocal"):
        return _under_root(behind_casts(node.args[0]))
    return None


def _without_eps(radicand: fx.Node) -> tuple[fx.Node, float]:
    """Split `power + eps` into both; returns (radicand, 0) if no number is added."""
    if is_call(radicand, "add") and not radicand.kwargs:
        for power, eps in operands(radicand):
            if isinstance(power, fx.Node) and (value := number(eps)) is not None:
                return power, value
    return radicand, 0.0


def _scaled(node: fx.Node, op: str) -> tuple[fx.Node, float] | None:
    """Split `op(...) * number` or `op(...) / number` into the call and the factor."""
    if is_call(node, "div") and is_call(call := behind_casts(node.args[0]), op) and (divisor := number(node.args[1])):
        return call, 1 / divisor
    if is_call(node, "mul"):
        for value, other in operands(node):
            if is_call(call := behind_casts(value), op) and (factor := number(other)) is not None:
                return call, factor
    return None
