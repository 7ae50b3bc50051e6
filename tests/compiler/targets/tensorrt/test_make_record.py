"""Tests of describing profiles, with kernels as TensorRT logs them."""

from __future__ import annotations

from llmc.compiler.targets.tensorrt.build_log import BuildLog, EngineLayer, EngineTensor
from llmc.compiler.targets.tensorrt.make_record import describe_profiles
from llmc.compiler.targets.tensorrt.network import MatMul
from llmc.runtimes.engines.tensorrt.record import AttentionRecord, ProfileRecord

Q, K = MatMul("q", "int8", "int8", 64, 64), MatMul("k", "int8", "int8", 64, 32)
HEAD = MatMul("head", "fp16", "fp16", 64, 512)
KEY = EngineTensor("present.0.key", (-1, 2, 256, 32), "fp16")


def half(name: str, *shape: int) -> EngineTensor:
    return EngineTensor(name, shape, "fp16")


def codes(*shape: int) -> EngineTensor:
    return EngineTensor("codes", shape, "int8")


def kernel(
    kernel: str = "k",
    inputs: tuple[EngineTensor, ...] = (),
    constants: tuple[EngineTensor, ...] = (),
    outputs: tuple[EngineTensor, ...] = (),
    nodes: tuple[str, ...] = (),
    kind: str = "kgen",
    profile: int = 0,
) -> EngineLayer:
    return EngineLayer(f"{kernel}_1", kind, kernel, profile, inputs, constants, outputs, nodes)


def describe(*layers: EngineLayer) -> ProfileRecord:
    log = BuildLog()
    log.layers, log.activation_bytes = list(layers), [7, 8]
    return describe_profiles(log, ["prefill", "decode"], [Q, K, HEAD], ["attention"])["prefill"]


def test_kernels_and_memory_are_those_of_the_profile() -> None:
    record = describe(kernel(), kernel(kind="shape_call"), kernel(kind="wait"), kernel(profile=1))
    assert (record.kernels, record.activation_bytes) == (1, 7)


def test_a_merged_gemm_computes_several_nodes() -> None:
    x = EngineTensor("x", (-1, 64), "int8")
    record = describe(kernel("gemm", (x,), (codes(1, 64, 96), half("alpha", 1)), (), ("k", "q", "norm")))
    (gemm,) = record.gemms
    assert (gemm.nodes, gemm.shape, gemm.kernel) == (["k", "q"], [64, 96], "gemm")
    assert (gemm.weight, gemm.input, gemm.requested, gemm.requested_input) == ("int8", "int8", "int8", "int8")
    assert record.unknown_gemms == ["head"]


def test_kernels_after_a_gemm_are_none_themselves() -> None:
    scale = kernel("scale", (half("y", -1, 64),), (half("scales", 1, 64),), (), ("q",))
    assert describe(scale, kernel("update", (KEY,), (), (KEY,), ("q", "k"))).gemms == []


def test_a_quantized_input_is_told_from_a_residual_as_wide() -> None:
    residual, x = half("residual", -1, 64), EngineTensor("x", (-1, 64), "int8")
    (gemm,) = describe(kernel("gemm", (residual, x), (codes(64, 64),), (), ("q",))).gemms
    assert gemm.input == "int8"


def test_a_weight_that_another_kernel_writes_out_is_expanded() -> None:
    written = half("w", 1, 64, 64)
    record = describe(
        kernel("dequantize", (), (codes(64, 64), half("scales", 64)), (written,), ("q_weight",)),
        kernel("gemm", (half("x", -1, 64), written), (), (), ("q",)),
    )
    assert record.expanded == {"dequantize_1": ["q_weight"]}
    assert record.gemms[0].weight == "fp16"


def test_a_lookup_in_quantized_embeddings_expands_nothing() -> None:
    rows = half("rows", -1, 512, 64)
    assert describe(kernel("gather", (), (codes(512, 64),), (rows,), ("gather",))).expanded == {}


def test_fused_attention_is_found_by_its_kernel() -> None:
    norm = kernel("norm", nodes=("attention", "norm"))
    assert describe(norm).attentions == [AttentionRecord("attention", None)]
    fused = describe(norm, kernel("_gemm_mha_v2", nodes=("attention",)))
    assert fused.attentions == [AttentionRecord("attention", "_gemm_mha_v2")]


def test_caches_in_place() -> None:
    record = describe(kernel("update", (half("k", -1, 64), KEY), (), (KEY, half("q", -1, 4, 1, 32))))
    assert record.caches.in_place == ["present.0.key"]
    assert record.caches.copied == record.caches.read_in_full == {}


def test_a_copied_cache_is_not_in_place() -> None:
    past = half("past_key_values.0.key", *KEY.shape)
    record = describe(kernel("move", (past,), (), (KEY,)), kernel("update", (KEY,), (), (KEY,)))
    assert record.caches.copied == {"present.0.key": "move"}
    assert record.caches.in_place == []


def test_caches_that_are_repeated_for_all_heads_are_read_in_full() -> None:
    record = describe(kernel("repeat", (KEY,), (), (half("keys", -1, 4, 32, 256),)))
    assert record.caches.read_in_full == {"present.0.key": "repeat"}
    assert describe(kernel("_gemv_mha_v1", (KEY,), (), (half("y", -1, 1, 128),))).caches.read_in_full == {}
