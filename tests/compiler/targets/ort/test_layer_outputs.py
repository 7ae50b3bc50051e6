"""Finding the outputs of layers, on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from compiled import artifact

from llmc import LlmcError
from llmc.compiler.targets.ort.layer_outputs import LayerOutputs, add_layer_outputs, find_layer_outputs
from llmc.runtimes.artifact.open import read_manifest


def find(*nodes: tuple[str, str, str, str], outputs: tuple[str, ...] = ("logits",)) -> LayerOutputs:
    """Of nodes (op, name, inputs, outputs)."""
    made = [onnx.helper.make_node(op, i.split(), o.split(), name=name) for op, name, i, o in nodes]
    given = [onnx.ValueInfoProto(name=name) for name in outputs]
    return find_layer_outputs(onnx.helper.make_graph(made, "graph", [], given))


EMBED = ("Gather", "m.embed/Gather", "table input_ids", "h")


def test_one_value_leaves() -> None:
    found = find(
        EMBED,
        ("Relu", "m.layers.0.mlp/Relu", "h", "a"),
        ("Add", "m.layers.0/Add", "h a", "b"),
        ("Relu", "m.layers.1.mlp/Relu", "b", "c"),
        ("Add", "m.layers.1/Add", "b c", "d"),
        ("MatMul", "head/MatMul", "d w", "logits"),
    )
    assert found == LayerOutputs(
        {"m.layers.0": "b", "m.layers.1": "d"}, {"m.layers.1": "m.layers.0", "": "m.layers.1"}, {}
    )


def test_a_sum_that_is_fused_with_the_norm_after_it() -> None:
    norm = ("SkipSimplifiedLayerNormalization", "m.layers.1.norm/Skip_0", "h a g", "n x y s")
    for after, total in ((norm, "s"), (("Add", "m.layers.1.norm/Add", "h1 a", "s"), "s")):
        found = find(
            EMBED,
            ("Relu", "m.layers.0/Relu", "h", "h1"),
            ("Relu", "m.layers.0/Relu_2", "h1", "a"),
            (after[0], after[1], after[2].replace("h ", "h1 "), after[3]),
            ("Relu", "m.layers.1/Relu", "s", "z"),
            ("MatMul", "head/MatMul", "z w", "logits"),
        )
        assert found.values == {"m.layers.0": total, "m.layers.1": "z"}
        assert found.before["m.layers.1"] == "m.layers.0"


def test_two_values_that_are_no_sum_are_said() -> None:
    product = find(
        EMBED,
        ("Relu", "m.layers.0/Relu", "h", "a"),
        ("Tanh", "m.layers.0/Tanh", "h", "b"),
        ("Mul", "m.layers.1/Mul", "a b", "c"),
        ("MatMul", "head/MatMul", "c w", "logits"),
    )
    assert product.unclear == {"m.layers.0": "2 values leave it, not one"}
    sum_and_more = find(
        EMBED,
        ("Relu", "m.layers.0/Relu", "h", "a"),
        ("Tanh", "m.layers.0/Tanh", "h", "b"),
        ("Add", "m.layers.1/Add", "a b", "c"),
        ("Mul", "m.layers.1/Mul", "a c", "d"),
        ("MatMul", "head/MatMul", "d w", "logits"),
    )
    assert sum_and_more.unclear == {"m.layers.0": "2 values leave it, not one"}


def test_what_hangs_on_sizes_or_is_kept_does_not_leave() -> None:
    found = find(
        EMBED,
        ("Shape", "m.layers.0/Shape", "h", "length"),
        ("Attention", "m.layers.0/Attention", "h h h", "a present.0.key"),
        ("Relu", "m.layers.0/Relu", "a", "k"),
        ("Attention", "m.layers.1/Attention", "a k k", "b"),
        ("Reshape", "m.layers.1/Reshape", "b length", "c"),
        ("Relu", "m.layers.1/Relu", "present.0.key", "d"),
        ("MatMul", "head/MatMul", "c w", "logits"),
        outputs=("logits", "present.0.key"),
    )
    assert found.values == {"m.layers.0": "a", "m.layers.1": "c"}


def test_tokens_selected_outside_of_a_layer_are_its_output() -> None:
    found = find(
        EMBED,
        ("Relu", "m.layers.0/Relu", "h", "a"),
        ("Gather", "m.layers.0/Gather", "a rows", "b"),
        ("Gather", "m.norm/Gather", "a rows", "c"),
        ("Add", "m.norm/Add", "b c", "d"),
        ("MatMul", "head/MatMul", "d w", "logits"),
    )
    assert found.values == {"m.layers.0": "d"}


def test_a_loop_reads_what_its_body_reads() -> None:
    body = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["a"], ["in"])], "body", [], [])
    loop = onnx.helper.make_node("Loop", ["n"], ["b"], name="m.layers.1/Loop", body=body)
    nodes = [
        onnx.helper.make_node("Gather", ["table", "input_ids"], ["h"], name="m.embed/Gather"),
        onnx.helper.make_node("Relu", ["h"], ["a"], name="m.layers.0/Relu"),
        loop,
        onnx.helper.make_node("MatMul", ["b", "w"], ["logits"], name="head/MatMul"),
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [], [onnx.ValueInfoProto(name="logits")])
    assert find_layer_outputs(graph).values == {"m.layers.0": "a", "m.layers.1": "b"}


def test_a_graph_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder: Path = artifact("speaking")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = node.name.replace(".layers.", ".layers_")
    monkeypatch.setattr(onnx, "load", lambda *a, **k: model)
    with pytest.raises(LlmcError, match=r"NO_LAYER_BORDERS.*none of its modules has a number"):
        add_layer_outputs(folder, read_manifest(folder))
