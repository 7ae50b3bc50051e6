"""Parse ONNX graphs with TensorRT, interpret the networks, and compare the results with ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from llmc.compiler.targets.tensorrt.interpreter.run import run
from llmc.runtimes.engines.tensorrt.library import find_library

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT4 = np.dtype(ml_dtypes.int4)

ELEMENTS: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    BFLOAT16: TensorProto.BFLOAT16,
    FLOAT8: TensorProto.FLOAT8E4M3FN,
    INT4: TensorProto.INT4,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.bool_): TensorProto.BOOL,
}
FLOATS: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": BFLOAT16}

# One rounding to each dtype, and for float32 sums of some terms in another order.
TOLERANCES = {"fp32": 1e-5, "fp16": 1.01 * 2.0**-11, "bf16": 1.01 * 2.0**-8}

Arrays = Mapping[str, np.ndarray]


# Graphs -------------------------------------------------------------------------------------------------------------


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> NodeProto:
    """Return a node; names are separated by blanks, and "-" omits an input."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), name=f"{kind}_{outputs.split()[0]}", **attributes)


def initializer(name: str, value: np.ndarray) -> TensorProto:
    """Return a tensor in the ONNX element type of an array; two 4-bit codes share a byte, the low nibble first."""
    stored = packed(value) if value.dtype == INT4 else np.ascontiguousarray(value)
    return helper.make_tensor(name, ELEMENTS[value.dtype], value.shape, stored.tobytes(), raw=True)


def packed(codes: np.ndarray) -> np.ndarray:
    nibbles = codes.astype(np.int8).reshape(-1).view(np.uint8) & 15
    pairs = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8)).reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def graph(
    nodes: Iterable[NodeProto],
    feeds: Arrays,
    constants: Arrays,
    outputs: Sequence[str],
    static: bool = False,
) -> onnx.ModelProto:
    """Return a model whose inputs have the dtypes and ranks of the feeds.

    Args:
        static: True fixes all sizes of inputs; otherwise the first one is symbolic.
    """
    inputs = []
    for name, value in feeds.items():
        shape: list[int | str] = list(value.shape)
        if shape and not static:
            shape[0] = f"{name}_0"
        inputs.append(helper.make_tensor_value_info(name, ELEMENTS[value.dtype], shape))
    tensors = [initializer(name, value) for name, value in constants.items()]
    body = helper.make_graph(list(nodes), "graph", inputs, [ValueInfoProto(name=name) for name in outputs], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    for output, inferred in zip(model.graph.output, onnx.shape_inference.infer_shapes(model).graph.output, strict=True):
        output.type.tensor_type.elem_type = inferred.type.tensor_type.elem_type
    return model


# Running ------------------------------------------------------------------------------------------------------------


class Network:
    """A network of TensorRT, with what must live as long as it."""

    def __init__(self) -> None:
        self.library = find_library().module
        module = self.library

        class Silent(module.ILogger):  # type: ignore[name-defined, misc]
            def log(self, severity: Any, message: str) -> None:
                pass

        self._constants: list[np.ndarray] = []
        self._logger = Silent()
        self._builder = self.library.Builder(self._logger)
        self.network = self._builder.create_network(0)

    def parse(self, model: onnx.ModelProto | Path) -> Any:
        """Parse a model, or a file with external data, and return the network."""
        self._parser = self.library.OnnxParser(self.network, self._logger)
        if isinstance(model, Path):
            done = self._parser.parse_from_file(str(model))
        else:
            done = self._parser.parse(model.SerializeToString())
        assert done, [self._parser.get_error(i).desc() for i in range(self._parser.num_errors)]
        return self.network

    def input(self, name: str, value: np.ndarray) -> Any:
        """Add an input with the dtype and shape of a value."""
        return self.network.add_input(name, self.dtype(value.dtype), value.shape)

    def constant(self, value: np.ndarray) -> Any:
        self._constants.append(value)
        return self.network.add_constant(value.shape, self.library.Weights(value)).get_output(0)

    def output(self, tensor: Any, name: str = "y") -> None:
        tensor.name = name
        self.network.mark_output(tensor)

    def dtype(self, dtype: np.dtype[Any]) -> Any:
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8", "bool": "BOOL"}
        return getattr(self.library.DataType, names.get(dtype.name, dtype.name.upper()))


def interpret(model: onnx.ModelProto | Path, feeds: Arrays, constants: Arrays | None = None) -> dict[str, np.ndarray]:
    return run(Network().parse(model), feeds, constants or {})


def run_in_onnxruntime(model: onnx.ModelProto | Path, feeds: Arrays) -> dict[str, np.ndarray]:
    """Run each node as it is written, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


# Comparing ----------------------------------------------------------------------------------------------------------


def check_op(
    nodes: NodeProto | Sequence[NodeProto],
    feeds: Arrays,
    constants: Arrays | None = None,
    outputs: str = "y",
    dtypes: Sequence[str] = ("fp32", "fp16", "bf16"),
    roundings: int = 1,
    summed: bool = False,
    static: bool = False,
) -> None:
    """Compare the interpreted network with ONNX Runtime in several dtypes.

    Args:
        feeds, constants: floats in float32, which are rounded to each dtype. Other dtypes stay.
        dtypes: ONNX Runtime has few kernels for bf16, so it runs a float32 graph of the same numbers.
        roundings: how often a result is rounded, in the network or in ONNX Runtime.
        summed: True if rounded numbers are summed. Where they cancel, the error is one of the largest results.
    """
    nodes = [nodes] if isinstance(nodes, NodeProto) else list(nodes)
    for name in dtypes:
        own_feeds, own_constants = in_dtype(feeds, FLOATS[name]), in_dtype(constants or {}, FLOATS[name])
        network = graph(nodes, own_feeds, own_constants, outputs.split(), static)
        actual = interpret(network, own_feeds, own_constants)
        runnable = np.dtype(np.float32) if name == "bf16" else FLOATS[name]
        other_feeds, other_constants = in_dtype(own_feeds, runnable), in_dtype(own_constants, runnable)
        expected = run_in_onnxruntime(graph(nodes, other_feeds, other_constants, outputs.split(), static), other_feeds)
        assert actual.keys() == expected.keys()
        for output, value in actual.items():
            wanted = FLOATS[name] if expected[output].dtype == runnable else expected[output].dtype
            assert value.dtype == wanted, (name, output, value.dtype)
            assert_near(value, expected[output], roundings * TOLERANCES[name], summed, f"{name} {output}")


def in_dtype(arrays: Arrays, dtype: np.dtype[Any]) -> dict[str, np.ndarray]:
    """Round floats of 16 or 32 bits to a dtype."""
    floats = set(FLOATS.values())
    return {name: value.astype(dtype) if value.dtype in floats else value for name, value in arrays.items()}


def assert_near(actual: np.ndarray, expected: np.ndarray, rtol: float, summed: bool = False, what: str = "") -> None:
    """Compare with a relative tolerance, of each number or, if they are sums, of the largest."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    a, b = (x.astype(np.float64) for x in (actual, expected))
    atol = rtol * np.abs(b).max() if summed else max(rtol / 10, 1e-6)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=what)


def numbers(*shape: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    """Return random float32 numbers."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)
