"""Moves multiplications by a number into weights and attention scales."""

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
    """Spare a multiplication by a number where a weight, or the scale of attention, can carry it.

    Example:  q = mul(rope(q0, ...), 0.5);  attention(q, k, v, scale);  logits = div(linear(h, head), 8.0)
    Becomes:  attention(rope(q0, ...), k, v, scale * 0.5);              logits = linear(h, head_scaled)

    1. before attention: the scale takes what q or k is multiplied by; 2. before linears: their weights take it;
    3. behind a linear: its weight and bias take it; 4. behind an embedding: the table takes it. What moves values
    about without changing them may stand between.

    Left alone: 1. a weight that is read elsewhere too, such as a tied embedding; 2. a value with other readers;
    3. whatever has a step between that is not linear, or a rounded weight; 4. a number that changes shape or dtype.
    """

    needs = Stage.CANONICAL
    after = (MatchLinear, MatchEmbedding)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        found = _scaling(program, node)
        if found is None:
            return None
        value, factor = found
        misses: list[Miss] = []
        for move in (_into_attention, _into_next_linears, _into_producer):
            outcome = move(program, node, value, factor)
            if isinstance(outcome, Miss):
                misses.append(outcome)
            elif outcome:
                program.replace(node, value)
                return True
        return misses[0] if misses else None


def _scaling(program: Program, node: fx.Node) -> tuple[fx.Node, float] | None:
    """The value and the number, for a multiplication or division of one by the other."""
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
    """Whether the call passes on values of its first argument and nothing else."""
    return is_call(node, *_MOVES)


def _into_attention(program: Program, node: fx.Node, value: fx.Node, factor: float) -> bool | Miss | None:
    at = node
    while (reader := only_user(at)) is not None and (_moves(reader) or (is_op(reader, rope) and reader.args[0] is at)):
        at = reader
    reader = next((reader for reader in at.users if is_op(reader, attention)), None)
    if reader is None:
        return None
    given = attention.bind(reader.args, reader.kwargs)
    if [name for name, argument in given.items() if argument is at] not in (["q"], ["k"]):
        return None
    if len(at.users) > 1:
        return miss("the scaled value has other readers", node)
    if "scale" in reader.kwargs:
        reader.update_kwarg("scale", given["scale"] * factor)
    else:
        reader.update_arg(list(given).index("scale"), given["scale"] * factor)
    return True


def _into_next_linears(program: Program, node: fx.Node, value: fx.Node, factor: float) -> bool | Miss | None:
    linears, others = _ends(node)
    if not linears:
        return None
    if others:
        return miss("the scaled value has other readers", node)
    weights = {linear.bind(reader.args, reader.kwargs)["weight"]: None for reader in linears}
    return _scale(program, node, list(weights), linears, factor)


def _ends(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The linears that `node` is the input of, perhaps moved about, and whatever else reads it."""
    linears, others = [], []
    for reader in node.users:
        if _moves(reader) and reader.args[0] is node:
            more_linears, more_others = _ends(reader)
            linears += more_linears
            others += more_others
        elif is_op(reader, linear) and reader.args[0] is node and node not in reader.args[1:]:
            linears.append(reader)
        else:
            others.append(reader)
    return linears, others


def _into_producer(program: Program, node: fx.Node, value: fx.Node, factor: float) -> bool | Miss | None:
    at: Any = value
    shared = len(at.users) > 1
    while _moves(at):
        at = at.args[0]
        shared = shared or len(at.users) > 1
    if is_op(at, linear):
        given = linear.bind(at.args, at.kwargs)
        weights = [given["weight"]] if given["bias"] is None else [given["weight"], given["bias"]]
    elif is_op(at, embedding):
        weights = [embedding.bind(at.args, at.kwargs)["weight"]]
    else:
        return None
    if shared:
        return miss("the value is read unscaled, too", node)
    return _scale(program, node, weights, [at], factor)


def _scale(
    program: Program, node: fx.Node, weights: Sequence[fx.Node], readers: Sequence[fx.Node], factor: float
) -> bool | Miss:
    """Let `readers` read the weights times the factor, if nothing but them reads these weights."""
    for weight in weights:
        if program.weight_of(weight) is None:
            return miss("what would carry the number is computed", node)
        if not set(weight.users) <= set(readers):
            return miss(f"{weight.target} is read elsewhere, too", node)
    for weight in weights:
        name = str(weight.target)
        scaled = fold(program.weights[name], factor)
        new = program.add_weight(f"{name.removesuffix('_scaled')}_scaled", scaled, like=node)
        for reader in readers:
            reader.replace_input_with(weight, new)
    return True
