"""Tests of reading the log of a build."""

from __future__ import annotations

import pytest

from llmc.compiler.targets.tensorrt.build_log import BuildLog, EngineTensor, in_words

FORMAT = "Strides: [1], StrideOrder: [0], Datatype: {dtype}, Format: (Linear) Row major linear format"


def tensor(name: str, dims: str, dtype: str) -> str:
    return f"{{ Name: {name}, Dimensions: [{dims}], {FORMAT.format(dtype=dtype)} }}"


def layer(
    name: str, kind: str = "kgen", inputs: str = "", constants: str = "", outputs: str = "", more: str = ""
) -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [{inputs}], Constants: [{constants}], Outputs: [{outputs}], {more}"
    )


ENGINE = "\n".join(
    [
        "Layers:",
        layer(
            "q_U1+k_U2_myl0_1",
            "gemm",
            tensor("x_myl0", "1,-1,64", "BFloat16"),
            f"{tensor('w', '1,64,96', 'Int8')}, {tensor('alpha', '1', 'Float')}",
            tensor("y", "1,-1,96", "BFloat16"),
            "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: q][ONNX Layer: k][ONNX Layer: q]",
        ),
        layer("__myl_FcAdd_myl0_2", "runtime_fusion", more="StreamId: 0, Metadata: [ONNX Layer: o]"),
        layer(
            "_gemv_mha_v1_myl1_0",
            inputs=tensor("present.0.key [profile 1]", "-1,2,256,64", "Half"),
            more="TacticName: _gemv_mha_v1_0x12ab_vec, StreamId: 0, Metadata: [ONNX Layer: attention]",
        ),
        layer("__myl_Cast_myl1_1", more="TacticName: __myl_Cast_0x1f, StreamId: 0, Metadata: "),
    ]
)


@pytest.fixture
def log() -> BuildLog:
    log = BuildLog()
    log.add("VERBOSE", "Graph construction completed in 0.01 seconds.")
    log.add("INFO", "Total Activation Memory: 8438272 bytes")
    log.add("INFO", "Total Activation Memory: 8200192 bytes")
    log.add("INFO", "Total Weights Memory: 559744 bytes")
    log.add("VERBOSE", ENGINE)
    return log


def test_layers_are_read_with_their_tensors(log: BuildLog) -> None:
    gemm = log.layers[0]
    assert (gemm.kind, gemm.kernel, gemm.nodes) == ("gemm", "__myelin_CASK_STUB", ("q", "k"))
    assert gemm.inputs == (EngineTensor("x_myl0", (1, -1, 64), "bf16"),)
    assert gemm.constants == (EngineTensor("w", (1, 64, 96), "int8"), EngineTensor("alpha", (1,), "fp32"))
    assert gemm.outputs == (EngineTensor("y", (1, -1, 96), "bf16"),)


def test_kernels_have_names_without_numbers(log: BuildLog) -> None:
    names = [one.kernel for one in log.layers]
    assert names == ["__myelin_CASK_STUB", "__myl_FcAdd", "_gemv_mha_v1_vec", "__myl_Cast"]


def test_layers_belong_to_the_profile_of_their_part(log: BuildLog) -> None:
    # The last one's own names don't say so.
    assert [one.profile for one in log.layers] == [0, 0, 1, 1]
    assert log.layers[2].inputs[0].name == "present.0.key"


def test_memory_is_read(log: BuildLog) -> None:
    assert log.activation_bytes == [8438272, 8200192]
    assert log.weight_bytes == 559744
    log.clear()
    assert (log.layers, log.activation_bytes, log.weight_bytes) == ([], [], None)


def test_sizes_of_dynamic_tensors() -> None:
    assert EngineTensor("x", (2, 3), "fp16").numbers == EngineTensor("x", (2, 3), "fp16").numbers_per_entry == 6
    assert EngineTensor("x", (-1, 3), "fp16").numbers == 0
    assert EngineTensor("x", (-1, 3), "fp16").numbers_per_entry == 3


def test_warnings_are_kept_once_and_expected_ones_never() -> None:
    log = BuildLog()
    for message in (
        "a.cpp:12: Slow.",
        "a.cpp:13: Slow.",
        "ModelImporter.cpp:1071: Make sure input starts has Int64 binding.",
    ):
        log.add("WARNING", message)
    assert log.warnings == ["Slow."]


ATTENTION = (
    "IBuilder::buildSerializedNetworkToStream: Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] "
    "MyelinCheckException: decompose_composite_ops.cpp:59: CHECK(composite_op->is_decomposable()) failed. Attention "
    "operation was not supported by a dedicated kernel.  (See https://docs.nvidia.com/x.html#y for shapes.)  "
    "Alternatively, padded attention operation may be marked as decomposable, using the TensorRT)"
)
CACHE = (
    "ITensor::getDimensions: Error Code 4: API Usage Error ((Unnamed Layer* 0) [KVCacheUpdate]: cache has type Int8 "
    "but must have type Float, Half, or BFloat16. In checkType at /_src/optimizer/common/nodeBase.cpp:456)"
)
DRIVER = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/a.cpp:250 (35))"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (ATTENTION, "Attention operation was not supported by a dedicated kernel"),
        (CACHE, "(Unnamed Layer* 0) [KVCacheUpdate]: cache has type Int8 but must have type Float, Half, or BFloat16"),
        ("", "the library gives no reason"),
    ],
)
def test_errors_are_put_in_words(message: str, reason: str) -> None:
    assert in_words(message) == reason


def test_the_first_error_is_not_the_one_of_a_missing_driver() -> None:
    log = BuildLog()
    assert log.first_error == "the library gives no reason"
    log.add("ERROR", DRIVER)
    log.add("ERROR", CACHE)
    log.add("ERROR", ATTENTION)
    assert log.first_error.endswith("Float, Half, or BFloat16")
