"""Families in all precisions: gate, engine, its record, and the network against the graph. `make trt` runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lowered_networks import network_error
from transformers import PreTrainedModel

import llmc
from llmc.compiler.targets.tensorrt.check_record import check_record
from llmc.runtimes.engines.tensorrt.record import read_record
from llmc.runtimes.engines.tensorrt.section import GRAPH, read_section

pytest.importorskip("tensorrt_rtx")

# Heads of 64 have fused kernels; the windows are shorter than the prompts of the gate and of the comparison.
SHARED: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
WINDOW = {"sliding_window": 4}
MIXED = dict(WINDOW, layer_types=["sliding_attention", "full_attention"])
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED, head_dim=64)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHARED, head_dim=64)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SHARED, **MIXED, head_dim=64, query_pre_attn_scalar=64)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHARED, **WINDOW, pad_token_id=0)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=256, vocab_size=512)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SHARED, **MIXED, head_dim=64, query_pre_attn_scalar=64)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2, head_dim=64)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SHARED, **EXPERTS, num_experts=8, head_dim=64)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SHARED, **MIXED, head_dim=64, num_local_experts=4, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**SHARED | LATENT | EXPERTS)
    ),
    "diffllama": lambda: transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**SHARED, head_dim=64)),
}
# Attentions that TensorRT has no layer for, and that are written in basic ops: capped scores, sinks, and two of
# the same queries.
COMPOSED = {"gemma2": 2, "gpt_oss": 2, "diffllama": 2}
# Roundings of the largest number. A code of 8 bits is one of 127 steps or fewer, and may be the next one.
TOLERANCES = {"w8a8": 100, "fp8": 200}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    **{scheme: {"quantize": scheme} for scheme in ("int8", "int4", "fp8", "w8a8")},
}
IN_ALL = ("llama", "qwen3", "gemma3", "phi3", "gpt2")


PROMISED = [(family, name) for family in FAMILIES for name in PRECISIONS if family in IN_ALL or name == "bf16"]


@pytest.mark.parametrize(("family", "precision"), PROMISED)
def test_a_family(family: str, precision: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        made = llmc.compile(model, tmp_path / "out", target="trt", max_seq_len=256, **PRECISIONS[precision])

    section = read_section(made.manifest)
    record = read_record(made.path / section.plans[0].record)
    caches = [part for cache in made.manifest.caches for part in cache.parts]
    assert check_record(record, len(caches)) == []
    assert record.fallbacks == []
    asked = precision if precision in ("int8", "int4", "fp8") else {"w8a8": "int8"}.get(precision, section.dtype)
    for profile in record.profiles.values():
        assert len(profile.attentions) == 2 - COMPOSED.get(family, 0)
        assert asked in {gemm.weight for gemm in profile.gemms}
        print(f"{family} {precision}: {profile.kernels} kernels, {[one.weight for one in profile.gemms]}")

    error = network_error(made.path / GRAPH, section.dtype)
    print(f"{family} {precision}: {error:.1f} roundings, built in {record.seconds:.0f} s")
    assert error < TOLERANCES.get(precision, 10)
