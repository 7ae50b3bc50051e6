"""Where the layers of an ONNX graph end, and the same graph with what leaves each of them as outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnx

from ....errors import LlmcError
from ....ir.program import layer_in
from ....runtimes.artifact.manifest import Manifest
from ....runtimes.engines.ort.layers import WatchedGraph

# What adds two values, and which of its outputs is their sum.
_SUMS = {"Add": 0, "SkipSimplifiedLayerNormalization": 3}
# What reads keys and values as its second and third input.
_ATTENTIONS = ("Attention", "GroupQueryAttention")
# What tells how long a value is, and not what is in it.
_SIZES = ("Shape", "Size")


@dataclass(frozen=True)
class Borders:
    """The layers of a graph by their module's path, in order.

    Attributes:
        values: the name of the one value that leaves a layer.
        before: the layer that another one reads it from.
        unclear: why there is no such value.
    """

    values: dict[str, str]
    before: dict[str, str]
    unclear: dict[str, str]


def watch_layers(folder: Path, manifest: Manifest) -> dict[str, WatchedGraph]:
    """An artifact's graphs, by their file, so that they give what leaves each layer.

    Raises:
        LlmcError: NO_LAYER_BORDERS where there is not one layer that a single value leaves.
    """
    watched = {}
    for spec in manifest.graphs.values():
        model = onnx.load(folder / spec.file, load_external_data=False)
        borders = find_borders(model.graph)
        if not borders.values:
            reason = "; ".join(f"{layer}: {why}" for layer, why in list(borders.unclear.items())[:1])
            raise LlmcError(
                "NO_LAYER_BORDERS",
                f"{spec.file} has no layer that one value leaves ({reason or 'none of its modules has a number'}).",
                "Measure it without --per-layer.",
            )
        # Without a type: the runtime infers it.
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in borders.values.values())
        watched[spec.file] = WatchedGraph(model.SerializeToString(), borders.values, borders.before, borders.unclear)
    return watched


def find_borders(graph: onnx.GraphProto) -> Borders:
    """The one value that leaves each layer: nodes are named after the module that they came from.

    Only what depends on the tokens counts, and neither caches nor keys and values for another layer's attention. A
    layer's last sum may be one with the norm behind it: then two values leave, both for that node alone, and the sum is
    what it makes of them.
    """
    home = {"input_ids": ""}  # of a value that depends on the tokens, the layer that it is made in
    outputs = {output.name for output in graph.output}
    readers: dict[str, list[_Reader]] = {}
    for node in graph.node:
        read = [name for name in _inputs(node) if name in home]
        if not read or node.op_type in _SIZES:
            continue
        layer = layer_in(node.name.rpartition("/")[0])
        if not layer and node.op_type == "Gather" and node.input[1] == "rows":
            layer = home[read[0]]  # rows are taken where they are read, and what is taken is still the layer's
        attends_over = node.input[1:3] if node.op_type in _ATTENTIONS else ()
        for name in read:
            if name not in attends_over:
                readers.setdefault(name, []).append(_Reader(node, layer))
        home.update((name, layer) for name in node.output if name and name not in outputs)
    values: dict[str, str] = {}
    before: dict[str, str] = {}
    unclear: dict[str, str] = {}
    for layer in dict.fromkeys(filter(None, home.values())):
        behind = {name: [r for r in readers.get(name, []) if r.layer != layer] for name in home if home[name] == layer}
        leaving = {name: found for name, found in behind.items() if found}
        readings = [reader for found in leaving.values() for reader in found]
        if len(leaving) == 1:
            values[layer] = next(iter(leaving))
        elif len(leaving) == 2 and (total := _only_sum(readings)):
            values[layer] = total
        else:
            unclear[layer] = f"{len(leaving) or 'no'} values leave it, not one"
            continue
        for reader in readings:
            before.setdefault(reader.layer, layer)
    return Borders(values, before, unclear)


class _Reader(NamedTuple):
    node: onnx.NodeProto
    layer: str


def _only_sum(readings: list[_Reader]) -> str | None:
    """The sum of two values that nothing but the sum reads."""
    nodes = [reader.node for reader in readings]
    if len(nodes) == 2 and nodes[0] is nodes[1] and nodes[0].op_type in _SUMS:
        return str(nodes[0].output[_SUMS[nodes[0].op_type]])
    return None


def _inputs(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, in the graphs that it holds as well."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _inputs(inner)
