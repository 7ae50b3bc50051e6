"""Facts about single model types for `shrink`, and types without a tiny model."""

from __future__ import annotations

from typing import Any

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
_ATTENTION_PAIR = ["sliding_attention", "full_attention"]

# Keyed by the config's own model_type, so that the text part of a composite config is found too. Each entry has one of
# three reasons: attributes must agree with each other; the class's defaults don't give a working model; or the
# defaults leave out the characteristic feature of the family.
EXTRA: dict[str, dict[str, Any]] = {
    # Attributes that must agree.
    "falcon_h1": {
        **_MAMBA2,
        "mamba_d_ssm": 128,
        "mlp_multipliers": [0.7, 1.3],
        "ssm_multipliers": [0.7, 1.3, 0.8, 1.2, 0.9],
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16},
    "longcat_flash": {"head_dim": 8},  # the size of rope, equal to qk_rope_head_dim
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (8, 16),
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
    },
    "gemma3n_text": {  # layers that share keys and values need an earlier layer of each kind
        "num_hidden_layers": 4,
        "layer_types": _ATTENTION_PAIR * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dory": {  # layers before, in and after the loop; a small init would make its vectors smaller than the noise
        "num_hidden_layers": 4,
        "layer_types": _ATTENTION_PAIR * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "initializer_range": 1.0,
    },
    "gemma4_text": {"global_head_dim": 64},
    "gemma4_unified_text": {"global_head_dim": 64},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "sliding_window": 6,
    },
    "laguna": {"layer_types": _ATTENTION_PAIR, "num_attention_heads_per_layer": [4, 2]},
    "helium": {"head_dim": 16},  # its output projection is square
    "minicpm3": {"dim_model_base": 32},
    # Defaults that don't give a working model.
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 1.5},
        "ffn_config": {"moe_top_k": 2},
    },
    "cohere_compass_text": {
        "layer_types": _ATTENTION_PAIR,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": _ATTENTION_PAIR,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "musicgen_decoder": {"num_codebooks": 1},  # its batch entries are the codebooks of one sequence
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"autocast_kernel_dtype": "float32"},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 6,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "eos_token_id": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
    },
    # Characteristic features that the defaults leave out.
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "inkling_text": {"log_scaling_n_floor": 6},
    "minimax": dict.fromkeys(
        [f"{kind}_{factor}_factor" for kind in ("full_attn", "linear_attn", "mlp") for factor in ("alpha", "beta")], 0.8
    ),
    "blt": {"patching_threshold": 4.1},  # a typical entropy of random logits: some bytes end a patch, some don't
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "flint": {"mlp_only_layers": [0]},
    "mellum": {"layer_types": _ATTENTION_PAIR},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 6},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 3,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
}

_DRAFT_HEAD = "a draft head, not a complete model: forward needs the target model's hidden states, keys and values"
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the packages timm and pillow (its text part is gemma3n_text)",
    "gemma4_assistant": _DRAFT_HEAD,
    "gemma4_unified_assistant": _DRAFT_HEAD,
}

# Types whose forward has an argument position_ids that does not work.
WRONG_POSITION_IDS: dict[str, str] = {
    "reformer": "it pads to a whole chunk and computes the padded position_ids from the wrong, already padded length",
}
