"""What channels of a linear's input are multiplied by, moved into the weights on both sides of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...ir.stages import Stage
from ...ir.weights import Call, Weight, constant, fold
from ...kernels.ops import add_rms_norm, embedding, gated_act, layer_norm, linear, rms_norm
from ..base import Fuel, Pass, PassResult, miss
from ..queries import arguments, is_call, is_op

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleSite:
    """A value that only linears read, and what makes it.

    Attributes:
        value: what the linears read.
        readers: the linears.
        divided: weights whose entries, or rows, belong to the value's channels; and the first of those rows.
        table: an embedding that reads the readers' one weight too.
    """

    value: fx.Node
    readers: tuple[fx.Node, ...]
    divided: tuple[tuple[str, int], ...]
    table: fx.Node | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of what the linears multiply the value by."""
        return tuple(dict.fromkeys(str(reader.args[1].target) for reader in self.readers))  # type: ignore[union-attr]


class MoveScales(Pass):
    """Divide the channels that linears read by what calibration found, and multiply their weights by it.

    Example:  linear(rms_norm(x, w), m);                    linear(gated_act(gate, linear(x, u)), m)
    Becomes:  linear(rms_norm(x, w / s), m * s[None, :]);   linear(gated_act(gate, linear(x, u / s[:, None])), m * s)

    The program computes what it did. Channels of a similar size are rounded better than a few large ones among many
    small ones, and so are the columns of a matrix. Under a head whose weight is the embedding's table too, the rows
    that are looked up are divided again.

    Left alone: 1. a value that something else than linears reads; 2. one that is not made by a norm with a weight, or
    by a gated unit; 3. a weight that has other readers.

    Args:
        scales: by the name of the weight of the first linear that reads a value.
    """

    needs = Stage.OPTIMIZED

    def __init__(self, scales: Mapping[str, Tensor]) -> None:
        self.scales = scales

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        for node in program.nodes:
            name = str(getattr(node.args[1], "target", "")) if is_op(node, linear) else ""
            if name not in self.scales or fuel.empty:
                continue
            place = find_site(program, node)
            if isinstance(place, str):
                misses.append(miss(place, node))
            elif place.readers[0] is node:
                move(program, place, self.scales[name])
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)


def find_site(program: Program, reader: fx.Node) -> ScaleSite | str:
    """Where scales of the value that a linear reads can go, or why nowhere."""
    value = arguments(reader)["x"]
    others = [user for user in value.users if not (is_op(user, linear) and arguments(user)["x"] is value)]
    if others:
        return f"{others[0].name} reads its input too"
    readers = tuple(node for node in program.nodes if node in value.users)
    tables = []
    for node in readers:
        weight = arguments(node)["weight"]
        if program.weight_of(weight) is None:
            return "its matrix is no weight"
        tables += [user for user in weight.users if user not in readers]
    if (len(readers) > 1 and tables) or len(tables) > 1 or not all(is_op(table, embedding) for table in tables):
        return "its weight is read elsewhere too"
    made = _norm_behind(program, value) or _gated_behind(program, value)
    if made is None:
        return "its input has no weight that could take the scales"
    return ScaleSite(value, readers, made, tables[0] if tables else None)


def move(program: Program, place: ScaleSite, scales: Tensor) -> None:
    """Multiply what the linears read the value's channels by, and divide what makes them."""
    factor = constant(scales, f"{place.weights[0]}.channels")
    for name in place.weights:
        program.weights[name] = fold(program.weights[name], factor)
    for name, start in place.divided:
        program.weights[name] = divide_rows(program.weights[name], scales, start)
    if place.table is not None:
        looked_up = place.table
        with program.graph.inserting_after(looked_up):
            back = program.add_weight(
                f"{place.weights[0]}.back", constant(1 / scales, f"{place.weights[0]}.back"), like=looked_up
            )
            divided = program.call(aten.mul.Tensor, looked_up, back, like=looked_up)
        looked_up.replace_all_uses_with(divided, delete_user_cb=lambda user: user is not divided)


def divide_rows(weight: Weight, scales: Tensor, start: int) -> Weight:
    """Some of the rows divided, or entries of a vector; the others as they were."""
    factors = torch.ones(weight.shape[0])
    factors[start : start + len(scales)] = 1 / scales
    return Call(aten.mul.Tensor, (weight, constant(factors.view(-1, *[1] * (len(weight.shape) - 1)), "channels")))


def _norm_behind(program: Program, value: Any) -> tuple[tuple[str, int], ...] | None:
    """The weight and bias of the norm whose output this is."""
    norm = value.args[0] if _is_item(value, 0) else value
    if not any(is_op(norm, op) for op in (rms_norm, layer_norm, add_rms_norm)):
        return None
    call = arguments(norm)
    if call["weight"] is None:
        return None
    return _owned(program, call["weight"], call.get("bias"))


def _gated_behind(program: Program, value: Any) -> tuple[tuple[str, int], ...] | None:
    """The rows of the linear that a gated unit's input `up` comes from."""
    if not is_op(value, gated_act):
        return None
    call = arguments(value)
    up = call["up"]
    if call["limit"] is not None or call["offset"] or len(up.users) > 1:
        return None
    start, source = 0, up
    if _is_item(up) and is_call(up.args[0], "split_with_sizes"):
        split = arguments(up.args[0])
        if split["dim"] not in (-1, len(up.meta["val"].shape) - 1):
            return None
        start, source = sum(split["split_sizes"][: up.args[1]]), split["self"]
        if len(source.users) > 1:
            return None
    if not is_op(source, linear):
        return None
    call = arguments(source)
    owned = _owned(program, call["weight"], call["bias"])
    return owned and tuple((name, start) for name, _ in owned)


def _owned(program: Program, *nodes: fx.Node | None) -> tuple[tuple[str, int], ...] | None:
    """The names of weights that one node reads."""
    names = []
    for node in nodes:
        if node is None:
            continue
        if program.weight_of(node) is None or len(node.users) > 1:
            return None
        names.append((str(node.target), 0))
    return tuple(names)


def _is_item(node: Any, index: int | None = None) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and index in (None, node.args[1])
