"""Which layers of a program are the same, so that a model of eighty reads like a model of two.

Layers are the same when their calls are: the same ops on the same plain values, wired alike, on inputs and weights of
the same shapes and dtypes. Weights may hold different values; what a layer and its neighbours are called doesn't count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from itertools import groupby

from torch import Tensor, fx

from ...ir.program import Program, layer_of, op_name, where

OUTSIDE = ""  # the name of what belongs to no layer


def sections(program: Program) -> dict[str, list[fx.Node]]:
    """The calls of each layer in the program's order, and under `OUTSIDE` those of none."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "call_function":
            found.setdefault(layer_of(node), []).append(node)
    return found


def signature(layer: str, nodes: Iterable[fx.Node]) -> str:
    """Equal for two layers exactly if their calls are the same."""
    inside: dict[fx.Node, str] = {}
    outside: dict[fx.Node, str] = {}

    def show(value: fx.Node) -> str:
        if value in inside:
            return inside[value]
        if value.op == "get_attr":
            return _weight_role(layer, value)
        return outside.setdefault(value, f"input {len(outside)}: {_meaning(value)}")

    digest = hashlib.sha256()
    for place, node in enumerate(nodes):
        arguments = fx.map_arg((node.args, node.kwargs), show)
        digest.update(f"{where(node).removeprefix(layer)} {node.target} {arguments}\n".encode())
        inside[node] = f"call {place}"
    return digest.hexdigest()


def _weight_role(layer: str, node: fx.Node) -> str:
    """A weight by its name within the layer; what only this layer reads needs no name, what several read keeps it."""
    name = str(node.target)
    if layer and name.startswith(layer + "."):
        name = name.removeprefix(layer)
    elif all(layer_of(user) == layer for user in node.users):
        name = "own"
    return f"weight {name}: {_meaning(node)}"


def _meaning(node: fx.Node) -> str:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(
        f"{v.dtype}{[str(s) for s in v.shape]}" if isinstance(v, Tensor) else type(v).__name__ for v in values
    )


def fold(kinds: Mapping[str, Hashable]) -> list[list[str]]:
    """The layers of each kind together, in the order in which a kind first occurs."""
    found: dict[Hashable, list[str]] = {}
    for layer, kind in kinds.items():
        found.setdefault(kind, []).append(layer)
    return list(found.values())


def label(layers: Iterable[str]) -> str:
    """Names of layers in short: `model.layers.0-4, 6-10`; what is outside of them is called so."""
    parts = []
    for stem, group in groupby(layers, key=lambda layer: layer.rpartition(".")[0]):
        numbers = [int(layer.rpartition(".")[2]) for layer in group if layer != OUTSIDE]
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        parts += [f"{stem}.{spans}" if stem else spans] if spans else []
    return ", ".join(parts) or "outside of the layers"


def count_ops(nodes: Iterable[fx.Node]) -> dict[str, int]:
    """How often each op occurs, in the order of first use."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[op_name(node)] = counts.get(op_name(node), 0) + 1
    return counts
