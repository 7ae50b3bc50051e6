"""Find identical layers of a program.

A model of eighty layers is then shown as compactly as one of two. Two layers are identical if their calls are: the same
ops with the same constant arguments and the same connections, on inputs and weights of the same shapes and dtypes.
Weight values and layer names may differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from itertools import groupby

from torch import Tensor, fx

from ...ir.nodes import known_value
from ...ir.program import Program, layer_of, op_name, where

OUTSIDE = ""  # name of the section of calls that belong to no layer


def sections(program: Program) -> dict[str, list[fx.Node]]:
    """Group the program's calls by layer, in program order.

    `OUTSIDE` has the calls that belong to no layer.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "call_function":
            calls.setdefault(layer_of(node), []).append(node)
    return calls


def signature(layer: str, nodes: Iterable[fx.Node]) -> str:
    """Hash a layer's calls.

    Two layers have equal signatures exactly if they are identical (see above).
    """
    inside: dict[fx.Node, str] = {}
    outside: dict[fx.Node, str] = {}

    def show(value: fx.Node) -> str:
        if value in inside:
            return inside[value]
        if value.op == "get_attr":
            return _weight_role(layer, value)
        return outside.setdefault(value, f"input {len(outside)}: {_shapes(value)}")

    digest = hashlib.sha256()
    for index, node in enumerate(nodes):
        arguments = fx.map_arg((node.args, node.kwargs), show)
        digest.update(f"{where(node).removeprefix(layer)} {node.target} {arguments}\n".encode())
        inside[node] = f"call {index}"
    return digest.hexdigest()


def _weight_role(layer: str, node: fx.Node) -> str:
    """Describe a weight for the signature.

    A weight below the layer's name is described by its relative name, another weight that only this layer uses as
    `own`, and a weight that several layers share by its full name.
    """
    name = str(node.target)
    if layer and name.startswith(layer + "."):
        name = name.removeprefix(layer)
    elif all(layer_of(user) == layer for user in node.users):
        name = "own"
    return f"weight {name}: {_shapes(node)}"


def _shapes(node: fx.Node) -> str:
    value = known_value(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(
        f"{v.dtype}{[str(s) for s in v.shape]}" if isinstance(v, Tensor) else type(v).__name__ for v in values
    )


def fold(kinds: Mapping[str, Hashable]) -> list[list[str]]:
    """Group layers of equal kind, in the order in which each kind first occurs."""
    groups: dict[Hashable, list[str]] = {}
    for layer, kind in kinds.items():
        groups.setdefault(kind, []).append(layer)
    return list(groups.values())


def label(layers: Iterable[str]) -> str:
    """Shorten a list of layer names, such as `model.layers.0-4, 6-10`.

    The name of `OUTSIDE` is `outside of the layers`.
    """
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
    """Count the calls of each op, in the order of first use."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[op_name(node)] = counts.get(op_name(node), 0) + 1
    return counts
