"""Find the output value of each layer of an ONNX graph, and make these values outputs of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnx

from ....errors import LlmcError
from ....ir.program import layer_in
from ....runtimes.artifact.manifest import Manifest
from ....runtimes.engines.ort.layers import GraphWithLayerOutputs
from ....runtimes.engines.ort.section import read_section

# Ops that add two values -> the index of the output that is their sum.
_SUMS = {"Add": 0, "SkipSimplifiedLayerNormalization": 3}
# Ops whose second and third inputs are keys and values.
_ATTENTIONS = ("Attention", "GroupQueryAttention")
# Ops that depend on the shape of a value only.
_SIZES = ("Shape", "Size")


@dataclass(frozen=True)
class LayerOutputs:
    """The outputs of a graph's layers, by the layer's module path, in order.

    Attributes:
        values: the name of a layer's only output value.
        before: the layer whose output this layer uses.
        unclear: why a layer has no single output value.
    """

    values: dict[str, str]
    before: dict[str, str]
    unclear: dict[str, str]


def add_layer_outputs(folder: Path, manifest: Manifest) -> dict[str, GraphWithLayerOutputs]:
    """Return an artifact's graphs with the layers' outputs as additional outputs, by file name.

    Raises:
        LlmcError: NO_LAYER_BORDERS if no layer of a graph has a single output value.
    """
    graphs = {}
    for spec in read_section(manifest).graphs.values():
        model = onnx.load(folder / spec.file, load_external_data=False)
        outputs = find_layer_outputs(model.graph)
        if not outputs.values:
            reason = "; ".join(f"{layer}: {why}" for layer, why in list(outputs.unclear.items())[:1])
            raise LlmcError(
                "NO_LAYER_BORDERS",
                f"{spec.file} has no layer with a single output ({reason or 'none of its modules has a number'}).",
                "Measure it without --per-layer.",
            )
        # The runtime infers the type.
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs.values.values())
        graphs[spec.file] = GraphWithLayerOutputs(
            model.SerializeToString(), outputs.values, outputs.before, outputs.unclear
        )
    return graphs


def find_layer_outputs(graph: onnx.GraphProto) -> LayerOutputs:
    """Find the single output value of each layer. The layer of a node is part of the node's name.

    Only values that depend on the tokens count. Caches don't, nor do keys and values for the attention of another
    layer. The last sum of a layer may be fused with the following norm. Then the layer has two outputs that only this
    node uses, and the node's sum counts as the output.
    """
    layer_of_value = {"input_ids": ""}  # the layer that computes each value that depends on the tokens
    outputs = {output.name for output in graph.output}
    users: dict[str, list[_User]] = {}
    for node in graph.node:
        inputs = [name for name in _inputs(node) if name in layer_of_value]
        if not inputs or node.op_type in _SIZES:
            continue
        layer = layer_in(node.name.rpartition("/")[0])
        if not layer and node.op_type == "Gather" and node.input[1] == "rows":
            layer = layer_of_value[inputs[0]]  # the selected tokens still belong to the layer that computed them
        attends_over = set(_attended(node))
        for name in inputs:
            if name not in attends_over:
                users.setdefault(name, []).append(_User(node, layer))
        layer_of_value.update((name, layer) for name in node.output if name and name not in outputs)
    values: dict[str, str] = {}
    before: dict[str, str] = {}
    unclear: dict[str, str] = {}
    for layer in dict.fromkeys(filter(None, layer_of_value.values())):
        names = [name for name, its_layer in layer_of_value.items() if its_layer == layer]
        outside = {name: [user for user in users.get(name, []) if user.layer != layer] for name in names}
        used_outside = {name: found for name, found in outside.items() if found}
        all_users = [user for found in used_outside.values() for user in found]
        if len(used_outside) == 1:
            values[layer] = next(iter(used_outside))
        elif len(used_outside) == 2 and (total := _only_sum(all_users)):
            values[layer] = total
        else:
            unclear[layer] = f"{len(used_outside) or 'no'} values leave it, not one"
            continue
        for user in all_users:
            before.setdefault(user.layer, layer)
    return LayerOutputs(values, before, unclear)


class _User(NamedTuple):
    node: onnx.NodeProto
    layer: str


def _only_sum(users: list[_User]) -> str | None:
    """Return the sum of two values if one node that adds them is their only user."""
    nodes = [user.node for user in users]
    if len(nodes) == 2 and nodes[0] is nodes[1] and nodes[0].op_type in _SUMS:
        return str(nodes[0].output[_SUMS[nodes[0].op_type]])
    return None


def _inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the inputs of a node and of the nodes in its subgraphs."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _inputs(inner)


def _attended(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the keys and values of an attention, also of one in a subgraph of the node."""
    if node.op_type in _ATTENTIONS:
        yield from node.input[1:3]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _attended(inner)
