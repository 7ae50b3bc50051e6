"""Typed metadata of graph nodes. No other module knows the keys under which a node keeps it."""

from __future__ import annotations

from typing import Any

from torch import fx

_VALUE, _WHERE, _QUANTIZED_FROM = "val", "where", "quantized_from"  # "val" is torch's own name


def value_of(node: fx.Node) -> Any:
    """Return the example value of a node: a fake tensor, a symbolic size, or a list of them."""
    return node.meta[_VALUE]


def known_value(node: fx.Node) -> Any:
    """Return the example value of a node, or None if it has none, as the output node."""
    return node.meta.get(_VALUE)


def set_value(node: fx.Node, value: Any) -> None:
    """Set the example value of a node."""
    node.meta[_VALUE] = value


def where(node: fx.Node) -> str:
    """Return the path of the module that a node came from, such as `model.layers.0.mlp`; empty if there is none."""
    path: str = node.meta.get(_WHERE, "")
    return path


def set_where(node: fx.Node, path: str) -> None:
    """Set the path of the module that a node came from."""
    node.meta[_WHERE] = path


def quantized_from(node: fx.Node) -> str | None:
    """Return the name that a weight had before it was quantized; None for a node that holds no codes."""
    name: str | None = node.meta.get(_QUANTIZED_FROM)
    return name


def set_quantized_from(node: fx.Node, name: str) -> None:
    """Record the name that a weight had before it was quantized, on the node of its codes."""
    node.meta[_QUANTIZED_FROM] = name


def copy_metadata(node: fx.Node, copied: fx.Node) -> None:
    """Give a copy of a node all metadata of the original."""
    copied.meta = dict(node.meta)


def keep_only(node: fx.Node, value: Any, path: str) -> None:
    """Replace all metadata of a node, such as what torch.export left there, by a value and a path."""
    node.meta = {_VALUE: value, _WHERE: path}
