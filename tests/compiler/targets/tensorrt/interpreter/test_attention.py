"""Rotary embeddings, updates of caches and attention, held against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interpreting import Network, check_op, graph, interpret, node, numbers, run_in_onnxruntime

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

B, H, KV, S, T, D = 2, 4, 2, 3, 10, 8
QUERY = {"q": numbers(B, H, S, D)}
KEYS = {"k": numbers(B, KV, T, D, seed=1), "v": numbers(B, KV, T, D, seed=2)}
# Two sequences of different lengths: the first new token is at position 4 of one and 7 of the other.
STARTS = np.array([4, 7])
MASK = (np.arange(T) <= (STARTS[:, None] + np.arange(S))[..., None])[:, None]


# Rotary embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [{}, {"interleaved": 1}, {"rotary_embedding_dim": 4}])
def test_rotary_embedding(attributes: dict[str, int]) -> None:
    half = attributes.get("rotary_embedding_dim", D) // 2
    tables = {"c": numbers(T, half, seed=1), "s": numbers(T, half, seed=2)}
    feeds = {"x": QUERY["q"], "p": STARTS[:, None] + np.arange(S)}
    rope = node("RotaryEmbedding", "x c s p", **attributes)
    check_op(rope, feeds, tables, dtypes=["fp32", "bf16"], static=True)
    # ONNX Runtime rounds both products.
    check_op(rope, feeds, tables, dtypes=["fp16"], roundings=2, summed=True, static=True)


def test_rotary_embedding_by_cosines_of_each_token() -> None:
    feeds = {"x": QUERY["q"], "c": numbers(B, S, D // 2, seed=1), "s": numbers(B, S, D // 2, seed=2)}
    check_op(node("RotaryEmbedding", "x c s"), feeds, dtypes=["fp32", "bf16"], static=True)


def test_a_position_outside_the_table_is_an_error() -> None:
    tables = {"c": numbers(T, D // 2, seed=1), "s": numbers(T, D // 2, seed=2)}
    for wrong in (T, -1):
        feeds = {"x": QUERY["q"], "p": np.full((B, S), wrong)}
        model = graph([node("RotaryEmbedding", "x c s p")], feeds, tables, ["y"], static=True)
        with pytest.raises(ValueError, match=f"ROTARY_EMBEDDING .*position from {wrong} to {wrong}"):
            interpret(model, feeds)


# Caches -------------------------------------------------------------------------------------------------------------


def test_cache_update() -> None:
    feeds = {"c": KEYS["k"], "u": numbers(B, KV, S, D, seed=3), "i": STARTS}
    check_op(node("TensorScatter", "c u i", axis=2), feeds, dtypes=["fp32", "fp16", "bf16"])
    check_op(node("TensorScatter", "c u", axis=2), {"c": feeds["c"], "u": feeds["u"]}, dtypes=["fp32"], static=True)


def test_cache_update_leaves_its_input_alone() -> None:
    feeds = {"c": KEYS["k"].copy(), "u": numbers(B, KV, S, D, seed=3), "i": STARTS}
    interpret(graph([node("TensorScatter", "c u i", axis=2)], feeds, {}, ["y"]), feeds)
    np.testing.assert_array_equal(feeds["c"], KEYS["k"])


@pytest.mark.parametrize("wrong", [-1, T - S + 1])
def test_a_write_beyond_the_cache_is_an_error(wrong: int) -> None:
    feeds = {"c": KEYS["k"], "u": numbers(B, KV, S, D, seed=3), "i": np.array([0, wrong])}
    model = graph([node("TensorScatter", "c u i", axis=2)], feeds, {}, ["y"])
    with pytest.raises(ValueError, match=r"KV_CACHE_UPDATE .*but only 0 to 7 exist"):
        interpret(model, feeds)


# Attention ----------------------------------------------------------------------------------------------------------


def check_attention(inputs: str, feeds: dict[str, np.ndarray], **attributes: Any) -> None:
    """Compare: TensorRT's parser multiplies query and keys by the root of the scale, and rounds both."""
    attention = node("Attention", inputs, **attributes)
    check_op(attention, feeds, dtypes=["fp32"], static=True)
    check_op(attention, feeds, dtypes=["fp16", "bf16"], roundings=4, summed=True, static=True)


def test_attention_with_a_mask_of_bools() -> None:
    check_attention("q k v m", QUERY | KEYS | {"m": MASK}, scale=0.25)


def test_attention_with_the_usual_scale() -> None:
    check_attention("q k v m", QUERY | KEYS | {"m": MASK})


def test_attention_with_a_mask_of_numbers() -> None:
    check_attention("q k v m", QUERY | KEYS | {"m": numbers(B, H, S, T, seed=4)}, scale=0.25)
    check_attention("q k v m", QUERY | KEYS | {"m": numbers(B, 1, S, T, seed=4)}, scale=0.25)


def test_attention_of_all_keys() -> None:
    check_attention("q k v", QUERY | KEYS, scale=0.25)


def test_attention_of_as_many_kv_heads() -> None:
    check_attention("q k v", QUERY | {"k": numbers(B, H, T, D, seed=1), "v": numbers(B, H, T, D, seed=2)}, scale=0.25)


def test_causal_attention() -> None:
    check_attention("q k v", QUERY | KEYS, scale=0.25, is_causal=1)


def test_causal_attention_aligned_at_the_end() -> None:
    net = Network()
    kind = net.library.CausalMaskKind.LOWER_RIGHT
    inputs = [net.input(name, value) for name, value in (QUERY | KEYS).items()]
    attention = net.network.add_attention_v2(*inputs, net.library.AttentionNormalizationOp.SOFTMAX, kind)
    net.output(attention.get_output(0))
    mask = np.arange(T) <= np.arange(S)[:, None] + T - S
    feeds = QUERY | KEYS | {"m": np.broadcast_to(mask, (B, 1, S, T))}
    model = graph([node("Attention", "q k v m", scale=1.0)], feeds, {}, ["y"], static=True)
    actual, expected = run(net.network, QUERY | KEYS)["y"], run_in_onnxruntime(model, feeds)["y"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_attention_of_three_dimensions() -> None:
    feeds = {"q": numbers(B, S, H * D), "k": numbers(B, T, KV * D, seed=1), "v": numbers(B, T, KV * D, seed=2)}
    check_attention("q k v", feeds, scale=0.25, q_num_heads=H, kv_num_heads=KV)


def test_lengths_of_keys_are_refused() -> None:
    net = Network()
    library = net.library
    inputs = [net.input(name, value) for name, value in (QUERY | KEYS).items()]
    kinds = library.AttentionNormalizationOp.SOFTMAX, library.CausalMaskKind.NONE
    attention = net.network.add_attention_v2(*inputs, *kinds)
    lengths = np.array([4, 7], np.int32)
    attention.key_value_lengths = net.input("n", lengths)
    net.output(attention.get_output(0))
    with pytest.raises(NotImplementedError, match="attention with key_value_lengths, in ATTENTION_OUTPUT"):
        run(net.network, QUERY | KEYS | {"n": lengths})
