"""Move scales of a linear's input channels into the weights before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Program
from ...ir.stages import Stage
from ...ir.weights import Call, Weight, cast, constant, fold, widened
from ...kernels.ops import add_rms_norm, embedding, gated_act, layer_norm, linear, rms_norm
from ..base import Fuel, Pass, PassResult, miss
from ..queries import arguments, is_call, is_op

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleSite:
    """A value that only linears use, and the weights that produce its channels.

    Attributes:
        value: the input of the linears.
        readers: the linears.
        divided: the name of each weight that produces the value's channels, and the index of the output channel (or of
            the element, in a vector) that produces the first of them.
        table: an embedding that shares its weight with the only linear, as in a model with a tied LM head, or None.
    """

    value: fx.Node
    readers: tuple[fx.Node, ...]
    divided: tuple[tuple[str, int], ...]
    table: fx.Node | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the linears' weights, each once."""
        return tuple(dict.fromkeys(str(reader.args[1].target) for reader in self.readers))  # type: ignore[union-attr]


class MoveScales(Pass):
    """Divide input channels of linears by scales, and multiply their weights by them.

    Example:  linear(rms_norm(x, w), m);                    linear(gated_act(gate, linear(x, u)), m)
    Becomes:  linear(rms_norm(x, w / s), m * s[None, :]);   linear(gated_act(gate, linear(x, u / s[:, None])), m * s)

    The program's results stay the same. Channels of similar size lose less by rounding than a few large channels among
    many small ones; this applies to inputs and to weights. If the LM head is tied to the embedding, the embeddings are
    divided again after the lookup.

    Left alone: 1. a value that other ops than linears use; 2. a value that is not the output of a norm with a weight or
    of a gated unit; 3. a weight that has other users.

    Args:
        scales: one scale per channel [I], by the weight name of the first linear that uses the value.
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
            site = find_site(program, node)
            if isinstance(site, str):
                misses.append(miss(site, node))
            elif site.readers[0] is node:
                move(program, site, self.scales[name])
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)


def find_site(program: Program, reader: fx.Node) -> ScaleSite | str:
    """Return the site of a linear's input, or the reason why it cannot be scaled."""
    value = arguments(reader)["x"]
    others = [user for user in value.users if not (is_op(user, linear) and arguments(user)["x"] is value)]
    if others:
        return f"{others[0].name} uses its input too"
    readers = tuple(node for node in program.nodes if node in value.users)
    tables = []
    for node in readers:
        weight = arguments(node)["weight"]
        if program.weight_of(weight) is None:
            return "its weight is computed"
        tables += [user for user in weight.users if user not in readers]
    if (len(readers) > 1 and tables) or len(tables) > 1 or not all(is_op(table, embedding) for table in tables):
        return "its weight is used elsewhere too"
    divided = _norm_weights(program, value) or _up_weights(program, value)
    if divided is None:
        return "no weight before its input can absorb the scales"
    return ScaleSite(value, readers, divided, tables[0] if tables else None)


def move(program: Program, place: ScaleSite, scales: Tensor) -> None:
    """Divide a site's value by scales and multiply the weights of its linears by them."""
    factor = constant(scales, f"{place.weights[0]}.channels")
    for name in place.weights:
        weight = program.weights[name]
        program.weights[name] = cast(fold(widened(weight), factor), weight.dtype)
    for name, start in place.divided:
        program.weights[name] = divide_channels(program.weights[name], scales, start)
    if place.table is not None:
        lookup = place.table
        with program.graph.inserting_after(lookup):
            reciprocals = constant((1 / scales).to(value_of(lookup).dtype), f"{place.weights[0]}.back")
            back = program.add_weight(f"{place.weights[0]}.back", reciprocals, like=lookup)
            rescaled = program.call(aten.mul.Tensor, lookup, back, like=lookup)
        lookup.replace_all_uses_with(rescaled, delete_user_cb=lambda user: user is not rescaled)


def divide_channels(weight: Weight, scales: Tensor, start: int) -> Weight:
    """Divide output channels of a weight, or elements of a vector, by scales.

    Args:
        start: the channel that the first scale belongs to; channels without a scale stay as they are.
    """
    factors = torch.ones(weight.shape[0])
    factors[start : start + len(scales)] = 1 / scales
    factor = constant(factors.view(-1, *[1] * (len(weight.shape) - 1)), "channels")
    return cast(Call(aten.mul.Tensor, (widened(weight), factor)), weight.dtype)


def _norm_weights(program: Program, value: Any) -> tuple[tuple[str, int], ...] | None:
    """Return the weight and bias of the norm that computes the value, or None."""
    norm = value.args[0] if _is_item(value, 0) else value
    if not any(is_op(norm, op) for op in (rms_norm, layer_norm, add_rms_norm)):
        return None
    call = arguments(norm)
    if call["weight"] is None:
        return None
    return _unshared(program, call["weight"], call.get("bias"))


def _up_weights(program: Program, value: Any) -> tuple[tuple[str, int], ...] | None:
    """Return the weights of input `up` of the gated unit that computes the value."""
    if not is_op(value, gated_act):
        return None
    call = arguments(value)
    up = call["up"]
    if call["limit"] is not None or call["offset"] or len(up.users) > 1:
        return None
    start, source = 0, up
    if _is_item(up) and is_call(up.args[0], "split_with_sizes"):
        split = arguments(up.args[0])
        if split["dim"] not in (-1, len(value_of(up).shape) - 1):
            return None
        start, source = sum(split["split_sizes"][: up.args[1]]), split["self"]
        if len(source.users) > 1:
            return None
    if not is_op(source, linear):
        return None
    call = arguments(source)
    weights = _unshared(program, call["weight"], call["bias"])
    return weights and tuple((name, start) for name, _ in weights)


def _unshared(program: Program, *nodes: fx.Node | None) -> tuple[tuple[str, int], ...] | None:
    """Return the names of weights, or None if one is computed or has several users."""
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
