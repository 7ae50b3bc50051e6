"""Names follow the calls, equal constants are shared, and outputs are not copied."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from llmc import LlmcError
from llmc.compiler.targets.onnx.external import ExternalData
from llmc.compiler.targets.onnx.graph import IR_VERSION, MICROSOFT, OnnxGraph, Value, element


@pytest.fixture
def graph(tmp_path: Path) -> OnnxGraph:
    return OnnxGraph(ExternalData(tmp_path / "data"))


def test_names(graph: OnnxGraph) -> None:
    x = graph.input("x", torch.float32, ["n"])
    assert [graph.op("Relu", x), graph.op("Relu", x), graph.op("Split", x, count=2)] == [
        "Relu", "Relu_2", ("Split_0", "Split_1"),
    ]  # fmt: skip
    graph.scope = "layers.0"
    assert graph.op("Relu", x) == "layers.0/Relu"
    # An op may not take the name of an input.
    graph.scope = ""
    graph.input("Tanh", torch.float32, ["n"])
    assert graph.op("Tanh", x) == "Tanh_2"


def test_equal_constants_are_stored_once(graph: OnnxGraph) -> None:
    one = graph.constant([1, 2])
    assert graph.constant(torch.tensor([1, 2])) == one
    others = [graph.constant([1.0, 2.0]), graph.constant([[1, 2]]), graph.constant([1, 2], torch.int32)]
    assert len({one, *others}) == 4 == len(graph.initializers)
    assert (one.dtype, tuple(one.shape)) == (torch.int64, (2,))


def test_omitted_inputs(graph: OnnxGraph) -> None:
    x = graph.input("x", torch.float32, ["n"])
    graph.op("Clip", x, None, graph.constant(1.0), None, to=None)
    assert list(graph.nodes[0].input) == ["x", "", "const"]
    assert not graph.nodes[0].attribute


def test_values_are_renamed_to_their_outputs(graph: OnnxGraph) -> None:
    x = graph.input("x", torch.float32, ["n"])
    y = graph.op("Relu", x)
    z = graph.op("Neg", y)
    for value, name in ((y, "first"), (z, "second"), (y, "again"), (x, "x_again")):
        graph.output(value, name, torch.float32, ["n"])
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    # A value that is an output twice, and an input that is an output, need an Identity for the second name.
    assert [(n.op_type, *n.output) for n in model.graph.node] == [
        ("Relu", "first"), ("Neg", "second"), ("Identity", "again"), ("Identity", "x_again"),
    ]  # fmt: skip
    session = onnxruntime.InferenceSession(model.SerializeToString())
    got = session.run(None, {"x": torch.tensor([-1.0, 2.0]).numpy()})
    assert [g.tolist() for g in got] == [[0, 2], [0, -2], [0, 2], [-1, 2]]


def test_domains_are_declared(graph: OnnxGraph) -> None:
    x = graph.input("x", torch.float32, ["n"])
    assert [o.domain for o in graph.model().opset_import] == [""]
    graph.op("Gelu", x, domain=MICROSOFT)
    model = graph.model()
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24), (MICROSOFT, 1)]
    assert (model.ir_version, model.producer_name) == (IR_VERSION, "llmc")


def test_dtypes(graph: OnnxGraph) -> None:
    assert element(torch.bfloat16) == onnx.TensorProto.BFLOAT16
    with pytest.raises(LlmcError) as caught:
        element(torch.complex64)
    assert caught.value.code == "ONNX_DTYPE"


def test_a_value_equals_its_name() -> None:
    value = Value("x", torch.int32, [2, 3], "s0")
    assert (value, value.dtype, value.shape, value.symbol) == ("x", torch.int32, (2, 3), "s0")
