"""The dataflow of a section as boxes and edges, for the layout on the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import layer_of, op_name, where
from ...kernels.ops import op_of
from .layers import OUTSIDE

# The kind of a box decides its color: the first pattern that matches the op's name. A captured `aten.linear` and the
# `llmc.linear` that replaces it have the same color; the page fills the boxes of dialect ops.
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
    """One call of a section, or a value from outside the section.

    Attributes:
        op: name of the called op.
        kind: kind of the op, a key of `_KINDS`, `view` or `arithmetic`; `input` for a value from outside the section,
            `layers` for the one box that stands for all layers.
        dialect: True if the op belongs to llmc's dialect.
        value: dtype and shape of the result.
        inputs: indices of the boxes whose results it uses; always smaller than its own index.
        weights: names of the weights that it uses.
        leaves: True if its result is used outside the section, or is the program's output.
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
    """Draw one section as boxes. Arithmetic on sizes is left out.

    Args:
        layer: name of the section.
        nodes: calls of the section, in the program's order.
        lines: line of Python of each node.
    """
    boxes: list[Box] = []
    index: dict[fx.Node | str, int] = {}

    def index_of(node: fx.Node) -> int:
        """Index of the box for an operand.

        An operand from outside the section gets a box on its first use.
        """
        in_a_layer = layer == OUTSIDE and layer_of(node) != OUTSIDE
        key: fx.Node | str = "layers" if in_a_layer else node
        if key not in index:
            index[key] = len(boxes)
            boxes.append(_layers(index) if in_a_layer else _input(node, lines))
        return index[key]

    own = set(nodes)
    for node in nodes:
        if not _has_tensor(node):
            continue
        operands = [n for n in node.all_input_nodes if n.op != "get_attr" and _has_tensor(n)]
        inputs = tuple(dict.fromkeys(index_of(n) for n in operands))
        index[node] = len(boxes)
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


def _layers(index: Mapping[fx.Node | str, int]) -> Box:
    """Build the one box for all layers.

    Its inputs are all earlier boxes that a layer uses.
    """
    inputs = (at for node, at in index.items() if isinstance(node, fx.Node) and any(map(layer_of, node.users)))
    return Box("layers", "layers", False, "", tuple(inputs), (), False, "", "", "")


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
    value = value_of(node)
    return any(isinstance(v, Tensor) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _value(line: str) -> str:
    """Dtype and shape from the comment that the printer adds to a line, or ""."""
    return line.rpartition("  # ")[2] if "  # " in line else ""
