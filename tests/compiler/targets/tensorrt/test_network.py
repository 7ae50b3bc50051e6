"""Tests of parsing graphs and polishing networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tensorrt_decoders import Decoder, write_decoder

from llmc.compiler.targets.tensorrt.build_log import BuildLog
from llmc.compiler.targets.tensorrt.logger import make_logger
from llmc.compiler.targets.tensorrt.network import (
    MatMul,
    Network,
    checked,
    find_attentions,
    find_matmuls,
    parse,
)
from llmc.compiler.targets.tensorrt.polish import polish
from llmc.errors import LlmcError
from llmc.runtimes.engines.tensorrt.library import find_library

pytest.importorskip("tensorrt_rtx")

OUT, IN = 24, 16
Load = Callable[..., Network]


def load(path: Path) -> Network:
    library = find_library("tensorrt_rtx")
    return parse(library, make_logger(library.module, BuildLog()), path)


@pytest.fixture
def graph(tmp_path: Path) -> Load:
    """Load a graph from x [1, S, IN] with some nodes and arrays."""

    def make(nodes: list[Any], x: tuple[Any, ...] = (1, "S", IN), **arrays: np.ndarray) -> Network:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, x)]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
        tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        made = helper.make_graph(nodes, "test", inputs, outputs, tensors)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        return load(tmp_path / "model.onnx")

    return make


def op(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], name=f"{kind}.{output}", **attributes)


def half(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def the_matmul(network: Network) -> Any:
    (matmul,) = [layer for layer in network.layers if layer.type.name == "MATRIX_MULTIPLY"]
    return matmul


def is_transposing(network: Network) -> bool:
    matmul = the_matmul(network)
    return bool(matmul.op1 == network.library.module.MatrixOperation.TRANSPOSE)


# Weights --------------------------------------------------------------------------------------------------------------

TRANSPOSED = {
    "transpose": [op("Transpose", "w", "t", perm=[1, 0])],
    "several steps": [
        op("Unsqueeze", "w axis", "u"),
        op("Transpose", "u", "v", perm=[0, 2, 1]),
        op("Reshape", "v shape", "t"),
    ],
}
SHAPES = {"axis": np.array([0]), "shape": np.array([IN, OUT])}


@pytest.mark.parametrize("steps", TRANSPOSED)
def test_transposed_weights_are_multiplied_as_stored(graph: Load, steps: str) -> None:
    network = graph([*TRANSPOSED[steps], op("MatMul", "x t", "y")], w=half(OUT, IN), **SHAPES)
    assert not is_transposing(network)
    polish(network)
    assert is_transposing(network)
    weight = the_matmul(network).get_input(1)
    assert tuple(weight.shape) == (1, OUT, IN)
    assert find_matmuls(network) == [MatMul("MatMul.y", "fp16", "fp16", IN, OUT)]


def test_codes_are_transposed_after_they_are_dequantized(graph: Load) -> None:
    nodes = [
        op("DequantizeLinear", "codes scales", "w", axis=0),
        op("Transpose", "w", "t", perm=[1, 0]),
        op("MatMul", "x t", "y"),
    ]
    network = graph(nodes, codes=np.ones((OUT, IN), np.int8), scales=half(OUT) ** 2)
    polish(network)
    assert is_transposing(network)
    assert find_matmuls(network) == [MatMul("MatMul.y", "int8", "fp16", IN, OUT)]


def test_quantized_inputs_are_seen(graph: Load) -> None:
    nodes = [
        op("QuantizeLinear", "x one", "q"),
        op("DequantizeLinear", "q one", "d"),
        op("DequantizeLinear", "codes scales", "w", axis=0),
        op("Transpose", "w", "t", perm=[1, 0]),
        op("MatMul", "d t", "y"),
    ]
    one = np.array(1, np.float16)
    network = graph(nodes, codes=np.ones((OUT, IN), np.int8), scales=half(OUT) ** 2, one=one)
    polish(network)
    assert find_matmuls(network) == [MatMul("MatMul.y", "int8", "int8", IN, OUT)]


UNTOUCHED = {
    "stored as multiplied": ([op("Identity", "w", "t")], half(IN, OUT)),
    "reshaped": ([op("Reshape", "w shape", "t")], half(OUT, IN)),
    "transposed, then reshaped": (
        [op("Transpose", "w", "v", perm=[1, 0]), op("Reshape", "v shape", "t")],
        half(OUT * 2, IN // 2),
    ),
    "transposed twice": (
        [op("Transpose", "w", "v", perm=[1, 0]), op("Transpose", "v", "t", perm=[1, 0])],
        half(IN, OUT),
    ),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_other_weights_are_left_alone(graph: Load, case: str) -> None:
    steps, weight = UNTOUCHED[case]
    network = graph([*steps, op("MatMul", "x t", "y")], w=weight, **SHAPES)
    polish(network)
    assert not is_transposing(network)


def test_products_of_activations_are_left_alone(graph: Load) -> None:
    network = graph([op("Transpose", "x", "t", perm=[0, 2, 1]), op("MatMul", "x t", "y")])
    polish(network)
    assert not is_transposing(network)
    assert find_matmuls(network) == []


def multiplied(network: Network, operation: str) -> Any:
    """Multiply x with a weight that one layer reshapes and then transposes, as the parser never writes it."""
    module, x = network.library.module, network.definition.get_input(0)
    weight = half(IN, IN)
    network.constants.append(weight)
    shuffle = network.add("shuffle", network.add("constant", (IN, IN), module.Weights(weight)).get_output(0))
    shuffle.reshape_dims, shuffle.second_transpose = (1, IN, IN), (0, 2, 1)
    none, other = module.MatrixOperation.NONE, getattr(module.MatrixOperation, operation)
    return network.add("matrix_multiply", x, none, shuffle.get_output(0), other)


def test_a_layer_that_transposes_last_is_understood(graph: Load) -> None:
    network = graph([op("Identity", "x", "y")])
    matmul = multiplied(network, "NONE")
    polish(network)
    assert matmul.op1 == network.library.module.MatrixOperation.TRANSPOSE


def test_a_multiplication_that_transposes_itself_is_left_alone(graph: Load) -> None:
    network = graph([op("Identity", "x", "y")])
    matmul = multiplied(network, "TRANSPOSE")
    weight = matmul.get_input(1).name
    polish(network)
    assert the_matmul(network).get_input(1).name == weight


# Attention ------------------------------------------------------------------------------------------------------------


def attention_inputs(network: Network) -> tuple[Any, Any]:
    (attention,) = find_attentions(network)
    assert attention.node == "attention.0"
    return attention.layer.get_input(0), attention.layer.get_input(1)


def factor_of(network: Network, tensor: Any) -> float:
    """Return the constant that a tensor is multiplied with last."""
    makers = {layer.get_output(0).name: layer for layer in network.layers}
    product = makers[tensor.name]
    assert product.type.name == "ELEMENTWISE"
    constant = makers[makers[product.get_input(1).name].get_input(0).name]
    return float(np.asarray(constant.weights).item())


def test_attention_reads_the_cache_itself(tmp_path: Path) -> None:
    network = load(write_decoder(Decoder(layers=1), tmp_path))
    assert attention_inputs(network)[1].name != "present.0.key"
    polish(network)
    queries, keys = attention_inputs(network)
    assert keys.name == "present.0.key"
    assert factor_of(network, queries) == pytest.approx(64**-0.5)


def test_a_scale_of_one_multiplies_nothing(tmp_path: Path) -> None:
    network = load(write_decoder(Decoder(layers=1, scale_queries=True), tmp_path))
    polish(network)
    queries, keys = attention_inputs(network)
    assert keys.name == "present.0.key"
    assert queries.name.startswith("mul_"), "the graph's own product"


# Refusals -------------------------------------------------------------------------------------------------------------


def test_an_op_that_the_library_lacks_is_named(graph: Load) -> None:
    with pytest.raises(LlmcError, match=r"op Det, node 'Det\.y'") as caught:
        graph([op("Det", "x", "y")], x=(1, IN, IN))
    assert caught.value.code == "TRT_PARSE_REFUSED"


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(LlmcError) as caught:
        load(tmp_path / "model.onnx")
    assert caught.value.code == "TRT_PARSE_REFUSED"


def test_a_layer_that_the_library_refuses_is_an_error(graph: Load) -> None:
    network = graph([op("Identity", "x", "y")])
    x = network.definition.get_input(0)
    with pytest.raises(LlmcError, match="kind kv_cache_update") as caught:
        network.add("kv_cache_update", x, x, x, network.library.module.KVCacheMode.LINEAR)
    assert caught.value.code == "TRT_BUILD_FAILED"
    assert checked(x, "input") is x
