"""Shrink any Hugging Face config by rules on its attributes' names.

The rules don't depend on the model family.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

from .facts import EXTRA

VOCAB = 96
# Ordinary tokens are in [FIRST_TOKEN, LAST_TOKEN). Lower ids are pad, bos and eos; higher ids mark images and sounds.
FIRST_TOKEN, LAST_TOKEN = 3, 72

# The first matching pattern applies. A count or size becomes the minimum of its default and the value here, because a
# default of one group or one kv head is a feature of the family.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(\w*_)?vocab_size(_\w+)?|ngram_vocab_size_base|\w*_byte_group_vocab", VOCAB),
    (r"hidden_size_per_layer_input|\w*d_rel", 16),
    (r"\w*(hidden|embedding|emb|embed)(_size|_dim)(_global)?|\w*d_model|n_embd|lru_width", 64),
    (r"\w*(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|mid_dim|mlp_dim|feed_forward_size)", 48),
    (r"n_inner|dff|dim_ff|d_inner", 48),
    (r"\w*(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|linear_num_key_heads)", 2),
    (r"mamba_(n|num)_heads", 8),  # 8 heads of 16 give the inner size of 128 that most configs check
    (r"\w*(num_attention_heads|attention_heads|n_heads?|num_heads|num_value_heads)", 4),
    (r"head_dim", 32),  # heads * head_dim differs from the hidden size, as in many families
    (r"\w*qk_rope_head_dim|rotary_dim", 8),
    (r"\w*(head_dim|headdim|d_head|head_size|dim_head|kv_channels)", 16),
    (r"\w*(lora_rank|laurel_rank|adapter_rank|norm_rank|hc_lowrank|time_step_rank|dt_rank)", 16),
    (r"\w*(state_size|d_state)", 8),
    (r"first_k_dense_replace|\w*num_dense_layers|attn_layer_offset", 1),
    (r"\w*(layers|num_blocks)", 2),
    (r"\w*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"num_experts_per_tok(en)?|\w*moe_(k|topk)|moe_top_k|top_k_experts", 2),
    (r"n_group|n_groups|num_expert_group|mamba_n_?groups|o_groups|hc_count|hc_mult", 2),
    (r"topk_group|num_mem_blocks|\w*num_shared_experts|n_shared_experts|zero_expert_num|expert_layer_offset", 1),
    # Shorter than a test's sequence; otherwise a missing window would not change the result.
    (r"\w*(sliding_window|window_size|window_len|chunk_size|chunk_length|block_size|local_attention)", 6),
    (r"floor_scale|log_scaling_n_floor", 6),
    (r"index_topk", 4),
    (r"\w*max_position_embeddings|n_positions|n_ctx|max_seq_len|\w*context_length|\w*max_\w*positions", 128),
    (r"model_max_length|mem_len|\w*max_distance", 128),
    (r"\w*num_buckets|image_size|rel_extent|\w*(conv|out|output)_channels?", 16),
    (r"\w*layer_period", 2),
)
# With the defaults, a compiler could get these wrong without a visible effect: factors of one, caps far above and eps
# far below the values of a tiny model.
_VALUES: tuple[tuple[str, float], ...] = (
    (r"\w*soft_?cap(ping)?", 2.0),
    (r"swiglu_limit", 0.5),
    (r"\w*multiplier", 0.8),
    (r"logits_scaling|\w*routed_scaling_factor|route_scale", 1.25),
    (r"query_pre_attn_scalar", 9),
    (r"logit_scale", 0.5),
    (r"\w*(eps|epsilon)", 0.02),
)
# None in some default configs, although the model uses a number.
_NUMBERS_IF_NONE = {"head_dim": 32, "num_key_value_heads": 2}
_FIRST_TOKEN_IDS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "forced_eos": 2, "forced_bos": 1}


def shrink(default: PreTrainedConfig, extra: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Build a tiny config of `default`'s class with every kind of its layers.

    Args:
        default: the config to shrink; it is not changed.
        extra: attributes that override the rules and `EXTRA`; for a sub-config, a nested dict.
    """
    extra = EXTRA.get(default.model_type, {}) | (extra or {})
    raw = {f.name: f.default for f in dataclasses.fields(type(default))}
    base = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    depth_name = type(default).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    depth = _read(default, depth_name)
    layers = _representative_layers(default, depth)
    changes: dict[str, Any] = {"use_cache": False}
    marks = iter(range(VOCAB - 1, LAST_TOKEN, -1))
    for name in raw:
        value = _read(default, name)
        if name in _NUMBERS_IF_NONE and value is None:
            changes[name] = _NUMBERS_IF_NONE[name]
        elif name in base or value is None:
            continue
        elif isinstance(value, PreTrainedConfig):
            changes[name] = shrink(value, extra.get(name))
        elif re.fullmatch(r"\w*_(token_id|token_index)", name):
            changes[name] = _token_id(name, marks)
        elif name == depth_name:
            changes[name] = len(layers)
        elif isinstance(value, list) and len(value) == depth:
            changes[name] = [value[i] for i in layers] if _is_per_layer(value) else list(range(len(layers)))
        elif name == "rope_parameters" and isinstance(value, dict):
            changes |= {name: _shrink_rope(value)} if "original_max_position_embeddings" in str(value) else {}
        elif raw[name] is not None or "key_value_heads" in name:
            changes |= _shrink_value(name, value)
    if "kv_lora_rank" in changes and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]  # latent attention has no groups of heads
    if "is_decoder" in raw:
        changes["is_decoder"] = True
    changes |= {name: value for name, value in extra.items() if not isinstance(changes.get(name), PreTrainedConfig)}
    return type(default)(**changes)


def _read(config: PreTrainedConfig, name: str) -> Any:
    """Read a stored attribute directly.

    Configs with different layers refuse the normal access.
    """
    return vars(config).get(type(config).attribute_map.get(name, name))


def _is_per_layer(values: list[Any]) -> bool:
    """True if a list has one value per layer.

    False if it lists the ids of all layers.
    """
    return values != list(range(len(values)))


def _representative_layers(config: PreTrainedConfig, depth: Any) -> list[int]:
    """Choose every layer with a new value in a per-layer list, and at least two."""
    lists = [v for v in vars(config).values() if isinstance(v, list) and len(v) == depth and _is_per_layer(v)]
    if not lists:
        return [0, 1]
    chosen = [i for i in range(depth) if any(values.index(values[i]) == i for values in lists)]
    return chosen if len(chosen) > 1 else [0, 1]


def _token_id(name: str, marks: Any) -> int:
    stem = re.sub(r"_(token_id|token_index)$", "", name)
    return _FIRST_TOKEN_IDS[stem] if stem in _FIRST_TOKEN_IDS else next(marks)


def _shrink_value(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return {}
    for pattern, factor in _VALUES:
        if re.fullmatch(pattern, name) and isinstance(factor, int) >= isinstance(value, int):
            return {name: factor}
    for pattern, size in _SIZES:
        if isinstance(value, int) and value > 0 and re.fullmatch(pattern, name):
            return {name: min(value, size)}
    return {}


def _shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Shorten a rope scaling's original training length.

    It then has an effect at a test's few positions.
    """
    rope = copy.deepcopy(rope)
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = 8
    return rope
