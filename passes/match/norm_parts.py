"""What hand-written norms are made of: a division by a root, the mean of squares under it, a scale and a shift."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

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
    """Every reading of `node` as a division by a root: both orders of a product, all spellings of the root."""
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
    """The value of whose squares `node` is the mean over the last dim."""
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
    """The value of which `node` is the mean over the last dim, which it keeps with size 1."""
    node = behind_casts(node)
    if is_call(node, "mean"):
        reduction = node
    elif found := _scaled(node, "sum"):
        reduction, factor = found
        width = shape(reduction.args[0])[-1]  # type: ignore[arg-type]
        if not isinstance(width, int) or not math.isclose(factor * width, 1, rel_tol=1e-6):
            return miss("a sum that is not divided by the width is no mean", reduction)
    elif is_call(node, "sum"):
        return miss("a sum that is not divided by the width is no mean", node)
    else:
        return None
    given = arguments(reduction)
    if not over_last_dim(given["self"], given.get("dim"), given.get("keepdim")):
        return miss("it does not reduce the last dim alone and keep it", reduction)
    return given["self"]


def over_last_dim(x: fx.Node, dims: object, keepdim: object) -> bool:
    """Whether a reduction of `x` over these dims is over the last one and leaves size 1 there."""
    last = x.meta["val"].dim() - 1
    return isinstance(dims, (list, tuple)) and [d % (last + 1) for d in dims] == [last] and keepdim is True


def length_over_root_width(node: fx.Node) -> fx.Node | None:
    """The value whose root mean square `node` is, written as a vector norm times one over the root of the width."""
    found = _scaled(behind_casts(node), "linalg_vector_norm")
    if found is None:
        return None
    norm, factor = found
    given = arguments(norm)
    width = shape(given["self"])[-1]
    if given["ord"] != 2 or not over_last_dim(given["self"], given["dim"], given["keepdim"]):
        return None
    return given["self"] if isinstance(width, int) and math.isclose(factor * width**0.5, 1, rel_tol=1e-6) else None


def same_value(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold the same numbers, one of them perhaps in a wider dtype."""
    return behind_widening(a) is behind_widening(b)


@dataclass(frozen=True)
class Affine:
    """A scale and a shift behind a normed value, and the node that ends them."""

    end: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None


def affine(program: Program, normed: fx.Node, shifts: bool) -> Affine:
    """The scale, and the shift where `shifts` allows one, that are parameters of the last dim's width."""
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
    """Which of several `readings` of a norm's input to hand to an op that keeps its dtype, and the node to replace.

    The first that fits wins, so that a cast up before and down behind the norm go away with it.
    """
    for x in readings:
        if replaced := rounded_to(end, dtype(x)):
            return x, replaced
    return None


def _vector_beside(program: Program, node: fx.Node, normed: fx.Node) -> fx.Node | None:
    """The other operand of `node`, if it is a parameter with one value for each place of the last dim."""
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
    """Whether this is a weight or is computed from weights and numbers alone."""
    found, sources = set(), [node]
    while sources:
        source = sources.pop()
        if source.op == "placeholder":
            return False
        if source not in found:
            found.add(source)
            sources += source.all_input_nodes
    return any(source.op == "get_attr" for source in found)


def _under_root(node: object) -> fx.Node | None:
    if is_call(node, "sqrt") or (is_call(node, "pow") and number(node.args[1]) == 0.5):
        return node.args[0]  # type: ignore[return-value]
    return None


def _under_inverse_root(node: object) -> fx.Node | None:
    if is_call(node, "rsqrt") or (is_call(node, "pow") and number(node.args[1]) == -0.5):
        return node.args[0]  # type: ignore[return-value]
    if is_call(node, "reciprocal"):
        return _under_root(behind_casts(node.args[0]))
    return None


def _without_eps(radicand: fx.Node) -> tuple[fx.Node, float]:
    if is_call(radicand, "add") and not radicand.kwargs:
        for power, eps in operands(radicand):
            if isinstance(power, fx.Node) and (value := number(eps)) is not None:
                return power, value
    return radicand, 0.0


def _scaled(node: fx.Node, op: str) -> tuple[fx.Node, float] | None:
    """`op(..)` times or over a number, and the factor."""
    if is_call(node, "div") and is_call(call := behind_casts(node.args[0]), op) and (divisor := number(node.args[1])):
        return call, 1 / divisor
    if is_call(node, "mul"):
        for value, other in operands(node):
            if is_call(call := behind_casts(value), op) and (factor := number(other)) is not None:
                return call, factor
    return None
