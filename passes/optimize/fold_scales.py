"""Fold multiplications by a number into the weights or attention around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...ir.weights import fold
from ...kernels.ops import attention, embedding, linear, rope
from ..base import Rewrite, miss
from ..match.match_embedding import MatchEmbedding
from ..match.match_linear import MatchLinear
from ..queries import arguments, dtype, is_call, is_op, number, only_user, operands, same_shape


class FoldScales(Rewrite):
    """Fold multiplications by a number into weights and scales of attention.

    Example:  q = mul(rope(q0, ...), 0.5);  attention(q, k, v, scale);  logits = div(linear(h, head), 8.0)
    Becomes:  attention(rope(q0, ...), k, v, scale * 0.5);              logits = linear(h, head_scaled)

    1. Before attention, its scale absorbs a factor of q or k. 2. Before linears, their weights absorb it. 3. After a
    linear, its weight and bias absorb it. 4. After an embedding, its table absorbs it. Ops that only move values, such
    as reshape and transpose, may be in between.

    Left alone: 1. a weight that other ops use too, such as a tied embedding; 2. a value with other users; 3. a
    nonlinear op between the factor and the weight, or a quantized weight; 4. a factor that changes the value's shape or
    dtype.
    """

    needs = Stage.CANONICAL
    after = (MatchLinear, MatchEmbedding)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        scaling = _scaling(program, node)
        if scaling is None:
            return None
        value, factor = scaling
        misses: list[Miss] = []
        for fold_into in (_into_attention, _into_next_linears, _into_producer):
            outcome = fold_into(program, node, value, factor)
            if isinstance(outcome, Miss):
                misses.append(outcome)
            elif outcome:
                program.replace(node, value)
                return True
        return misses[0] if misses else None


def _scaling(program: Program, node: fx.Node) -> tuple[fx.Node, float] | None:
    """Return (value, factor) if the node scales a value by a number, else None."""
    if not is_call(node, "mul", "div") or arguments(node).get("rounding_mode") is not None:
        return None
    for value, other in operands(node):
        factor = _number(program, other)
        if factor is not None and isinstance(value, fx.Node) and program.weight_of(value) is None:
            if not same_shape(value, node) or dtype(value) != dtype(node) or not dtype(value).is_floating_point:
                return None
            if is_call(node, "mul"):
                return value, factor
            return (value, 1 / factor) if other is node.args[1] and factor else None
    return None


def _number(program: Program, value: Any) -> float | None:
    weight = program.weight_of(value)
    return float(weight.evaluate()) if weight is not None and weight.numel == 1 else number(value)


_MOVES = (
    "reshape", "view", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "slice",
    "contiguous", "clone", "repeat_interleave",
)  # fmt: skip


def _moves(node: fx.Node) -> bool:
    """True if the call only moves or repeats elements of its first argument."""
    return is_call(node, *_MOVES)


def _into_attention(program: Program, node: fx.Node, value: fx.Node, factor: float) -> bool | Miss | None:
    end = node
    while (user := only_user(end)) is not None and (_moves(user) or (is_op(user, rope) and user.args[0] is end)):
        end = user
    user = next((user for user in end.users if is_op(user, attention)), None)
    if user is None:
        return None
    call = attention.bind(user.args, user.kwargs)
    if [name for name, argument in call.items() if argument is end] not in (["q"], ["k"]):
        return None
    if len(end.users) > 1:
        return miss("the scaled value has other users", node)
    if "scale" in user.kwargs:
        user.update_kwarg("scale", call["scale"] * factor)
    else:
        user.update_arg(list(call).index("scale"), call["scale"] * factor)
    return True


def _into_next_linears(program: Program, node: fx.Node, value: fx.Node, factor: float) -> bool | Miss | None:
    linears, others = _linear_users(node)
    if not linears:
        return None
    if others:
        return miss("the scaled value has other users", node)
    weights = {linear.bind(user.args, user.kwargs)["weight"]: None for user in linears}
    return _scale_weights(program, node, list(weights), linears, factor)


def _linear_users(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the linears that take `node` as input, and its other users.

    Looks through ops that only move values.
    """
    linears, others = [], []
    for user in node.users:
        if _moves(user) and user.args[0] is node:
            more_linears, more_others = _linear_users(user)
            linears += more_linears
            others += more_others
        elif is_op(user, linear) and user.args[0] is node and node not in user.args[1:]:
            linears.append(user)
        else:
            others.append(user)
    return linears, others


def _into_producer(program: Program, node: fx.Node, value: fx.Node, factor: float) -> bool | Miss | None:
    producer: Any = value
    shared = len(producer.users) > 1
    while _moves(producer):
        producer = producer.args[0]
        shared = shared or len(producer.users) > 1
    if is_op(producer, linear):
        call = linear.bind(producer.args, producer.kwargs)
        weights = [call["weight"]] if call["bias"] is None else [call["weight"], call["bias"]]
    elif is_op(producer, embedding):
        weights = [embedding.bind(producer.args, producer.kwargs)["weight"]]
    else:
        return None
    if shared:
        return miss("the unscaled value has other users", node)
    return _scale_weights(program, node, weights, [producer], factor)


def _scale_weights(
    program: Program, node: fx.Node, weights: Sequence[fx.Node], users: Sequence[fx.Node], factor: float
) -> bool | Miss:
    """Multiply the weights of `users` by the factor, unless other ops use them too."""
    for weight in weights:
        if program.weight_of(weight) is None:
            return miss("the weight that would absorb the number is computed", node)
        if not set(weight.users) <= set(users):
            return miss(f"{weight.target} is used elsewhere too", node)
    for weight in weights:
        name = str(weight.target)
        scaled = fold(program.weights[name], factor)
        new = program.add_weight(f"{name.removesuffix('_scaled')}_scaled", scaled, like=node)
        for user in users:
            user.replace_input_with(weight, new)
    return True
