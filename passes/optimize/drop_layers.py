"""Layers taken out of a program: what flowed into one flows on as if it had come out of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from ...errors import LlmcError
from ...ir.program import Program, layer_of
from ...ir.stages import Stage
from ..base import Fuel, Pass, PassResult
from ..queries import dtype, same_shape


@dataclass(frozen=True)
class Layer:
    """A layer that could be left out.

    Attributes:
        name: the path of its module.
        before, after: the value that it is given, and what it makes of it.
        first: the first of its ops that reads `before`.
    """

    name: str
    before: fx.Node
    after: fx.Node
    first: fx.Node


class DropLayers(Pass):
    """Leave layers out.

    Example:  x1 = x0 + block0(x0);  x2 = x1 + block1(x1);  x3 = x2 + block2(x2)
    Becomes:  x1 = x0 + block0(x0);  x3 = x1 + block2(x1)

    While a layer's norms and adds are its own: fused across its borders, two values would cross each. Before there
    are caches: those of layers that are gone are never made.

    Left alone: 1. all other layers. A program whose layers are no chain is refused.

    Args:
        layers: their names, as `find_layers` gives them.
    """

    needs = Stage.CANONICAL
    keeps_numbers = False

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = layers

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches = 0
        # The last one first: what comes out of a layer that goes is still what flows into the next.
        for layer in reversed(find_layers(program)):
            if layer.name in self.layers and not fuel.empty:
                layer.after.replace_all_uses_with(layer.before)
                matches += 1
                fuel.burn()
        return PassResult(matches)


def find_layers(program: Program) -> list[Layer]:
    """The repeated layers of a program in order, each of which reads what the one before it gives.

    What hangs on positions and sizes alone may pass between layers as it likes.

    Raises:
        LlmcError: LAYERS_NOT_A_CHAIN where other values cross, or the one that does has another shape behind a layer.
    """
    flowing = _of_tokens(program)
    members: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node in flowing and layer_of(node):
            members.setdefault(layer_of(node), []).append(node)
    if not members:
        raise _no_chain("it has no numbered layers")
    layers: list[Layer] = []
    for name, nodes in members.items():
        layers.append(_layer(name, nodes, flowing, layers[-1] if layers else None))
    return layers


def _layer(name: str, nodes: list[fx.Node], flowing: set[fx.Node], previous: Layer | None) -> Layer:
    inside = set(nodes)
    leaving = [node for node in nodes if not inside.issuperset(node.users)]
    if len(leaving) != 1:
        names = ", ".join(node.name for node in leaving) or "nothing"
        raise _no_chain(f"{names} of {name} is read behind it, not one value")
    (after,) = leaving
    readers: dict[fx.Node, fx.Node] = {}  # of what comes in, the first
    for node in nodes:
        for read in node.all_input_nodes:
            if read in flowing and read not in inside:
                readers.setdefault(read, node)
    fitting = [read for read in readers if same_shape(read, after) and dtype(read) == dtype(after)]
    if previous is not None:
        fitting = [read for read in fitting if read is previous.after]
    if len(fitting) != 1:
        source = f"what {previous.name} gives" if previous else "one value"
        raise _no_chain(f"{name} does not turn {source} into another of its shape and dtype")
    return Layer(name, fitting[0], after, readers[fitting[0]])


def _of_tokens(program: Program) -> set[fx.Node]:
    """The values that depend on what the tokens are, not only on how many there are."""
    found = {program.inputs[0]}
    for node in program.nodes:
        if node.op != "call_function" or isinstance(node.meta["val"], torch.SymInt):
            continue
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _no_chain(why: str) -> LlmcError:
    return LlmcError(
        "LAYERS_NOT_A_CHAIN",
        f"Layers of this model can't be left out: {why}.",
        "Compile it without --drop-layers; --prune works on any model.",
    )
