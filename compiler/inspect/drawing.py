"""The dataflow of a section as boxes and edges, ready to be laid out on a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir.program import layer_of, op_name, where
from ...kernels.ops import op_of
from .layers import OUTSIDE

# What a box is coloured by: the first pattern that an op's name matches. Whether the op is of the dialect is said
# besides, so that a captured `aten.linear` and the `llmc.linear` that it becomes have one colour.
_KINDS = {
    "attention": r"\w*attention",
    "linear": r"(quant_)?linear|moe|matmul|bmm|addmm|mm|einsum|conv1d",
    "norm": r"\w*norm",
    "rope": r"rope|cos|sin",
    "embedding": r"(quant_)?embedding|take_rows",
    "activation": r"gated_act|silu|gelu|relu|sigmoid|tanh|elu|mish|softplus|hardtanh",
}


@dataclass(frozen=True)
class Box:
    """One call, or what comes in from elsewhere.

    Attributes:
        op: what it calls.
        kind: of what sort that is; `input` for what comes from elsewhere, `layers` for all the layers in one.
        dialect: whether the op is one of llmc's own.
        value: dtype and shape of what it gives.
        inputs: the boxes that it reads, by place; a box stands behind all that it reads.
        weights: the names of the weights that it reads.
        leaves: whether it goes out: of a layer to what follows, of the program as its output.
        name, where, text: the node, its module, and its line of Python.
    """

    op: str
    kind: str
    dialect: bool
    value: str
    inputs: tuple[int, ...]
    weights: tuple[str, ...]
    leaves: bool
    name: str
    where: str
    text: str


Drawing = tuple[Box, ...]


def draw(layer: str, nodes: Sequence[fx.Node], lines: Mapping[fx.Node, str]) -> Drawing:
    """The boxes of one section; arithmetic on sizes is left out."""
    boxes: list[Box] = []
    place: dict[fx.Node | str, int] = {}

    def place_of(node: fx.Node) -> int:
        """The box for a value that is read: a call of this section, or something from elsewhere."""
        among_layers = layer == OUTSIDE and layer_of(node) != OUTSIDE
        key: fx.Node | str = "layers" if among_layers else node
        if key not in place:
            place[key] = len(boxes)
            boxes.append(_layers(place) if among_layers else _input(node, lines))
        return place[key]

    own = set(nodes)
    for node in nodes:
        if not _has_tensor(node):
            continue
        read = [n for n in node.all_input_nodes if n.op != "get_attr" and _has_tensor(n)]
        inputs = tuple(dict.fromkeys(place_of(n) for n in read))
        place[node] = len(boxes)
        boxes.append(
            Box(
                op=op_name(node),
                kind=_kind(node),
                dialect=op_of(node.target) is not None,
                value=_value(lines[node]),
                inputs=inputs,
                weights=tuple(str(n.target) for n in node.all_input_nodes if n.op == "get_attr"),
                leaves=any(user.op == "output" if layer == OUTSIDE else user not in own for user in node.users),
                name=node.name,
                where=where(node),
                text=lines[node],
            )
        )
    return tuple(boxes)


def _layers(place: Mapping[fx.Node | str, int]) -> Box:
    """All layers as one box, which reads what any of them reads."""
    read = (at for node, at in place.items() if isinstance(node, fx.Node) and any(map(layer_of, node.users)))
    return Box("layers", "layers", False, "", tuple(read), (), False, "", "", "")


def _input(node: fx.Node, lines: Mapping[fx.Node, str]) -> Box:
    op = node.name if node.op == "placeholder" else op_name(node)
    text = lines.get(node, "")
    return Box(op, "input", False, _value(text), (), (), False, node.name, where(node), text)


def _kind(node: fx.Node) -> str:
    name = op_name(node).rpartition(".")[2]
    for kind, pattern in _KINDS.items():
        if re.fullmatch(pattern, name):
            return kind
    return "view" if _is_view(node) else "arithmetic"


def _is_view(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return any(result.alias_info for result in node.target._schema.returns)
    return op_name(node) == "getitem"


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta["val"]
    return any(isinstance(v, Tensor) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _value(line: str) -> str:
    """The printer's note on dtype and shape."""
    return line.rpartition("  # ")[2] if "  # " in line else ""
