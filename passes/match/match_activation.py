"""Replace spelled-out activations by the ATen calls for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.program import Miss, Program, op_name
from ..base import Rewrite, miss
from ..queries import dtype, is_call, number, operands

aten = torch.ops.aten

Polynomial = dict[int, float]  # coefficients by power
_HIGHEST_POWER = 4
# The depth of nested calls that are read as a polynomial. Formulas are shallow; their input may be the whole model.
_DEEPEST = 8


class MatchActivation(Rewrite):
    """Replace a spelled-out activation by one ATen call.

    Example:  h = mul(x, 0.5);  u = mul(add(x, mul(pow(x, 3), 0.044715)), 0.7978845608);  y = mul(h, add(tanh(u), 1))
    Becomes:  y = gelu(x, approximate="tanh")

    Likewise `0.5 * x * (1 + erf(x / sqrt(2)))` becomes `gelu(x)` and `x * sigmoid(x)` becomes `silu(x)`. Operands may
    be in any order and association: the argument of tanh, erf or sigmoid is read as a polynomial in x, and constant
    factors are multiplied together.

    Left alone: 1. `x * sigmoid(1.702 * x)`, for which ATen has no call; 2. a formula with other constants than those
    of an activation; 3. an x that is not floating point.
    """

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        outcome = None
        for x, curve, factor in _products(node):
            squashed = _squashing_call(curve)
            if squashed is None:
                continue
            outside, inside = _polynomial(curve, squashed), _polynomial(squashed.args[0], x)
            if outside is None or inside is None:
                continue
            form = _FORMS[op_name(squashed)]
            if not _equal(inside, form.inside):
                outcome = miss("its argument is not that of a gelu", squashed) if 0 in outside else None
            elif not _equal(_times(outside, {0: factor}), form.outside):
                continue  # a factor applied by a later call may complete it
            elif not dtype(x).is_floating_point:
                outcome = miss("its input is not floating point", node)
            else:
                program.replace_with(node, form.call, x, **form.kwargs)
                return True
        return outcome


def _products(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, float]]:
    """All ways to read `node` as `factor * x * curve`, as (x, curve, factor).

    Constant factors are split off the product and off x, but not off the curve.
    """
    for product, outer in _factorings(node):
        if is_call(product, "mul"):
            for left, curve in operands(product):
                if isinstance(left, fx.Node) and isinstance(curve, fx.Node):
                    for x, inner in _factorings(left):
                        yield x, curve, outer * inner


def _factorings(node: fx.Node) -> Iterator[tuple[fx.Node, float]]:
    """All ways to read `node` as `factor * rest`, as (rest, factor); first (node, 1)."""
    factor = 1.0
    while True:
        yield node, factor
        if is_call(node, "mul"):
            step = next(((a, n) for a, b in operands(node) if (n := number(b)) is not None), None)
        elif is_call(node, "div") and not node.kwargs and (n := number(node.args[1])):
            step = node.args[0], 1 / n
        else:
            step = None
        if step is None or not isinstance(step[0], fx.Node):
            return
        node, factor = step[0], factor * step[1]


def _squashing_call(curve: fx.Node) -> fx.Node | None:
    """The tanh, erf or sigmoid call that `curve` scales and shifts, or None."""
    node: Any = curve
    while is_call(node, "add", "mul", "div"):
        sides = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(sides) != 1:
            return None
        node = sides[0]
    return node if is_call(node, "tanh", "erf", "sigmoid") else None


def _polynomial(node: Any, x: fx.Node, depth: int = _DEEPEST) -> Polynomial | None:
    """`node` as a polynomial in x, or None if it is none within `depth` nested calls."""
    if (value := number(node)) is not None:
        return {0: value}
    if node is x:
        return {1: 1.0}
    if depth == 0 or not is_call(node, "add", "mul", "div", "square", "pow") or node.kwargs:
        return None
    a = _polynomial(node.args[0], x, depth - 1)
    if a is None:
        return None
    if is_call(node, "square"):
        return _times(a, a)
    if is_call(node, "pow"):
        exponent = number(node.args[1])
        return _times(a, a) if exponent == 2 else _times(_times(a, a), a) if exponent == 3 else None
    if is_call(node, "div"):
        divisor = number(node.args[1])
        return _times(a, {0: 1 / divisor}) if divisor else None
    b = _polynomial(node.args[1], x, depth - 1)
    if b is None or is_call(node, "mul"):
        return _times(a, b)
    return {p: a.get(p, 0.0) + b.get(p, 0.0) for p in a.keys() | b.keys()}


def _times(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    if a is None or b is None:
        return None
    product: Polynomial = {}
    for p, m in a.items():
        for q, n in b.items():
            product[p + q] = product.get(p + q, 0.0) + m * n
    return product if max(product) <= _HIGHEST_POWER else None


def _equal(a: Polynomial | None, b: Polynomial) -> bool:
    """True if the coefficients agree up to rounding to float32."""
    if a is None:
        return False
    return all(math.isclose(a.get(p, 0.0), b.get(p, 0.0), rel_tol=1e-6, abs_tol=1e-9) for p in a.keys() | b.keys())


@dataclass(frozen=True)
class _Form:
    """An activation call and its formula, `x * outside(squash(inside(x)))`.

    `squash` is tanh, erf or sigmoid.
    """

    outside: Polynomial
    inside: Polynomial
    call: torch._ops.OpOverload
    kwargs: dict[str, str] = field(default_factory=dict)


_SLOPE = math.sqrt(2 / math.pi)
_FORMS = {
    "aten.tanh": _Form({0: 0.5, 1: 0.5}, {1: _SLOPE, 3: _SLOPE * 0.044715}, aten.gelu.default, {"approximate": "tanh"}),
    "aten.erf": _Form({0: 0.5, 1: 0.5}, {1: math.sqrt(0.5)}, aten.gelu.default),
    "aten.sigmoid": _Form({1: 1.0}, {1: 1.0}, aten.silu.default),
}
