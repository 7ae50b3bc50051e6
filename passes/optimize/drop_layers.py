"""Drop whole layers: the input of a dropped layer takes the place of its output."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from ...errors import LlmcError
from ...ir.nodes import value_of
from ...ir.program import Program, layer_of
from ...ir.stages import Stage
from ..base import Fuel, Numerics, Pass, PassResult
from ..queries import dtype, same_shape


@dataclass(frozen=True)
class Layer:
    """A layer that can be dropped.

    Attributes:
        name: the path of its module.
        before: its input, the hidden states.
        after: its output, of the same shape and dtype as `before`.
        first: the first of its ops that uses `before`.
    """

    name: str
    before: fx.Node
    after: fx.Node
    first: fx.Node


class DropLayers(Pass):
    """Remove whole layers from a program.

    Example:  x1 = x0 + block0(x0);  x2 = x1 + block1(x1);  x3 = x2 + block2(x2)
    Becomes:  x1 = x0 + block0(x0);  x3 = x1 + block2(x1)

    Run this pass before norms and residual adds are fused: if an op spans two layers, two values cross the boundary
    between them. Also run it before caches are inserted, so that dropped layers get none.

    Left alone: 1. all other layers. A program whose layers do not form a chain is refused.

    Args:
        layers: names of the layers to drop, as `find_layers` returns them.
    """

    needs = Stage.CANONICAL
    numerics = Numerics.LOSSY

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = layers

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches = 0
        # Last layer first. In forward order, the next layer's `before` would be a value that was just replaced.
        for layer in reversed(find_layers(program)):
            if layer.name in self.layers and not fuel.empty:
                layer.after.replace_all_uses_with(layer.before)
                matches += 1
                fuel.burn()
        return PassResult(matches)


def find_layers(program: Program) -> list[Layer]:
    """Return the program's numbered layers in order, as a chain.

    Each layer uses the output of the previous one. Only values that depend on token ids count: values of positions
    or sizes may cross layers freely.

    Raises:
        LlmcError: LAYERS_NOT_A_CHAIN if a layer has several outputs, if it does not use the output of the previous
            layer, or if its output has another shape or dtype than its input.
    """
    dependent = _token_dependent(program)
    members: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node in dependent and layer_of(node):
            members.setdefault(layer_of(node), []).append(node)
    if not members:
        raise _not_a_chain("it has no numbered layers")
    layers: list[Layer] = []
    for name, nodes in members.items():
        layers.append(_layer(name, nodes, dependent, layers[-1] if layers else None))
    return layers


def _layer(name: str, nodes: list[fx.Node], dependent: set[fx.Node], previous: Layer | None) -> Layer:
    inside = set(nodes)
    outputs = [node for node in nodes if not inside.issuperset(node.users)]
    if len(outputs) != 1:
        names = ", ".join(node.name for node in outputs) or "none of its values"
        raise _not_a_chain(f"{name} must have exactly one output, but later ops use {names}")
    (after,) = outputs
    first_users: dict[fx.Node, fx.Node] = {}  # for each input of the layer
    for node in nodes:
        for source in node.all_input_nodes:
            if source in dependent and source not in inside:
                first_users.setdefault(source, node)
    candidates = [source for source in first_users if same_shape(source, after) and dtype(source) == dtype(after)]
    if previous is not None:
        candidates = [source for source in candidates if source is previous.after]
    if len(candidates) != 1:
        expected = f"the output of {previous.name}" if previous else "exactly one input"
        raise _not_a_chain(f"{name} does not map {expected} to an output of the same shape and dtype")
    return Layer(name, candidates[0], after, first_users[candidates[0]])


def _token_dependent(program: Program) -> set[fx.Node]:
    """Return the values that depend on token ids, not only on the number of tokens."""
    dependent = {program.tokens}
    for node in program.nodes:
        if node.op != "call_function" or isinstance(value_of(node), torch.SymInt):
            continue
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def _not_a_chain(reason: str) -> LlmcError:
    return LlmcError(
        "LAYERS_NOT_A_CHAIN",
        f"Layers of this model cannot be dropped: {reason}.",
        "Compile it without --drop-layers; --prune works on any model.",
    )
