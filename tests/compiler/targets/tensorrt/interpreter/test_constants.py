"""Constants of an ONNX file that TensorRT does not return."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from interpreting import BFLOAT16, FLOAT8, INT4, graph, initializer, interpret, node, numbers
from onnx import TensorProto, helper

from llmc.compiler.targets.tensorrt.interpreter.constants import collect_constants, unpacked

CONSTANTS = {
    "w": numbers(6, 8).astype(BFLOAT16),
    "f": numbers(4, 6, seed=1, low=-400, high=400).astype(FLOAT8),
    "q": np.random.default_rng(2).integers(-8, 8, (3, 4)).astype(np.int8).astype(INT4),
    "a": np.array([0.5, 1, 2, 4], np.float32).astype(BFLOAT16),
    "b": np.array([[1, 2], [3, 4], [5, 6]], np.float32).astype(BFLOAT16),
}
NODES = [
    node("Transpose", "w", "t", perm=[1, 0]),
    node("MatMul", "x t", "p"),
    node("DequantizeLinear", "f a", "df", axis=0),
    node("Transpose", "df", "tf", perm=[1, 0]),
    node("MatMul", "p tf", "r"),
    node("DequantizeLinear", "q b", "dq", axis=1, block_size=2),
    node("Transpose", "dq", "tq", perm=[1, 0]),
    node("MatMul", "r tq"),
]
FEEDS = {"x": numbers(2, 8, seed=4).astype(BFLOAT16)}


def assert_same(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == CONSTANTS.keys()
    for name, value in CONSTANTS.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name].astype(np.float32), value.astype(np.float32))


def write(folder: Path, external: bool) -> Path:
    """Write the graph; its external data begins with other bytes."""
    model = graph(NODES, FEEDS, CONSTANTS | {"unused": np.ones(2, np.float32)}, ["y"])
    if external:
        data = bytearray(b"other")
        for tensor in model.graph.initializer:
            raw = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "data"), ("offset", len(data)), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))
            data += raw
        (folder / "data").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("external", [False, True])
def test_constants_are_collected(tmp_path: Path, external: bool) -> None:
    assert_same(collect_constants(write(tmp_path, external)))


def test_typed_fields_are_read(tmp_path: Path) -> None:
    model = graph([node("Identity", "w")], {}, {}, ["y"])
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [2], [1.5, -3]))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    found = collect_constants(path)["w"]
    assert found.dtype == BFLOAT16 and found.astype(np.float32).tolist() == [1.5, -3]


def test_codes_share_bytes_low_nibble_first() -> None:
    codes = unpacked(np.array([0x7F, 0x80, 0x03], np.uint8), (5,))
    assert codes.dtype == ml_dtypes.int4
    assert codes.astype(int).tolist() == [-1, 7, 0, -8, 3]
    assert initializer("q", codes).raw_data == bytes([0x7F, 0x80, 0x03])


def test_a_network_of_them_is_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = write(tmp_path, external=True)
    y = interpret(path, FEEDS, collect_constants(path))["y"]
    x, w, f, q, a, b = (value.astype(np.float32) for value in (FEEDS["x"], *CONSTANTS.values()))
    expected = x @ w.T @ (f * a[:, None]).T @ (q * np.repeat(b, 2, axis=1)).T
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=0.02 * np.abs(expected).max())
