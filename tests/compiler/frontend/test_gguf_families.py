"""The layouts of model families other than llama are undone, for values and for codes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from schemes import STORED
from transformers import BloomConfig, Gemma2Config, GPT2Config, Qwen3MoeConfig

import llmc
from llmc.ir.stages import Stage
from llmc.passes.quantize.quantization_plan import analyse

from .gguf_files import (
    LAYER,
    LLAMA_METADATA,
    VOCABULARY,
    T,
    Tensors,
    check_codes,
    check_read_back,
    gguf_name,
    random_model,
    without,
    write,
)


def test_one_is_subtracted_from_gemma_norms_and_tied_weights_share_a_source(tmp_path: Path) -> None:
    model, weights = random_model(
        Gemma2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    metadata = LLAMA_METADATA | {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 16}
    layer = LAYER | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    # Multiples of 1/8 are exact in float32, so adding and subtracting one changes nothing.
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 0
            if "norm" in name:
                parameter.copy_((parameter * 8).round() / 8)
                offset = 1
            tensors[gguf_name(name, layer)] = weights[name] + offset
    tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(np.float16)
    file = write(tmp_path / "m.gguf", "gemma2", metadata, tensors, T.F16)
    check_read_back(file, model)
    sources = file.hf_tensors(model)
    assert sources["lm_head.weight"] is sources["model.embed_tokens.weight"]
    assert sources["model.norm.weight"].dtype == torch.float32


def test_experts_are_merged_when_they_are_read(tmp_path: Path) -> None:
    model, weights = random_model(
        Qwen3MoeConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    tensors: Tensors = {}
    for name, value in weights.items():
        prefix = "blk." + "".join(re.findall(r"layers\.(\d+)", name))
        if name.endswith("experts.gate_up_proj"):
            tensors[f"{prefix}.ffn_gate_exps.weight"], tensors[f"{prefix}.ffn_up_exps.weight"] = np.split(value, 2, 1)
        elif name.endswith("experts.down_proj"):
            tensors[f"{prefix}.ffn_down_exps.weight"] = value
        else:
            tensors[gguf_name(name)] = value
    metadata = LLAMA_METADATA | {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 16}
    metadata |= {"expert_count": 4, "expert_used_count": 2}
    file = write(tmp_path / "m.gguf", "qwen3moe", metadata, tensors)
    check_read_back(file, model)
    merged = file.hf_tensors(model)["model.layers.0.mlp.experts.gate_up_proj"]
    assert merged.key == "m.gguf:blk.0.ffn_gate_exps.weight+blk.0.ffn_up_exps.weight"
    assert merged.nbytes == 4 * 1536 * 32 * 4

    quantized = write(tmp_path / "q.gguf", "qwen3moe", metadata, tensors, T.Q8_0)
    reasons = check_codes(quantized, model)
    experts = {name: reason for name, reason in reasons.items() if ".experts." in name}
    assert len(experts) == 4 and set(experts.values()) == {"its Q8_0 codes are not those of one matrix"}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "int8"
    plan = analyse(llmc.capture(quantized.path, until=Stage.OPTIMIZED), STORED)
    reported = [choice.not_as_stored for choice in plan.weights.values() if choice.not_as_stored]
    assert reported == ["its Q8_0 codes are not those of one matrix"] * 4


def test_gpt2_matrices_are_transposed(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_ctx=99, n_positions=1024)
    config.tie_word_embeddings = False
    model, weights = random_model(config)
    layer = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    layer |= {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
    ends = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    tensors: Tensors = {"output.weight": weights.pop("lm_head.weight")}
    for name, value in weights.items():
        module, _, kind = name.removeprefix("transformer.").rpartition(".")
        if module in ends:
            tensors[f"{ends[module]}.{kind}"] = value
        else:
            _, index, inner = module.split(".", 2)
            moved = value.T.copy() if ".c_" in name and kind == "weight" else value
            tensors[f"blk.{index}.{layer[inner]}.{kind}"] = moved
    metadata = {"block_count": 2, "context_length": 99, "embedding_length": 32, "attention.head_count": 4}
    check_read_back(write(tmp_path / "m.gguf", "gpt2", metadata, tensors), model)
    # One of the matrices is square, so its shape does not show that it is transposed.
    reasons = check_codes(write(tmp_path / "q.gguf", "gpt2", metadata, tensors, T.Q8_0), model)
    layers = {reason for name, reason in reasons.items() if ".h." in name}
    assert layers == {"the model family stores its Q8_0 codes in another layout"}


def test_fused_heads_of_bloom_are_regrouped(tmp_path: Path) -> None:
    heads, width = 4, 32
    model, weights = random_model(
        BloomConfig(vocab_size=len(VOCABULARY), hidden_size=width, n_layer=2, n_head=heads, layer_norm_epsilon=0.5)
    )
    layer = {"self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output"}
    layer |= {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
    layer |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    ends = {"word_embeddings": "token_embd", "word_embeddings_layernorm": "token_embd_norm", "ln_f": "output_norm"}
    tensors: Tensors = {}
    for name, value in without(weights, "lm_head.weight").items():
        module, _, kind = name.removeprefix("transformer.").rpartition(".")
        if module in ends:
            tensors[f"{ends[module]}.{kind}"] = value
            continue
        _, index, inner = module.split(".", 2)
        if inner.endswith("query_key_value"):
            value = value.reshape(heads, 3, width // heads, -1).swapaxes(0, 1).reshape(value.shape)
        tensors[f"blk.{index}.{layer[inner]}.{kind}"] = value
    metadata = {"block_count": 2, "embedding_length": width, "attention.head_count": heads}
    metadata |= {"attention.layer_norm_epsilon": 0.5}
    check_read_back(write(tmp_path / "m.gguf", "bloom", metadata, tensors), model)
    # The regrouping only permutes output channels, so the codes are kept.
    schemes = check_codes(write(tmp_path / "q.gguf", "bloom", metadata, tensors, T.Q8_0), model)
    assert len(schemes) == 10 and set(schemes.values()) == {"int8"}
