"""Write a Hugging Face folder of type llama as GGUF, for llama.cpp's quantizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor


def write_gguf(folder: Path, target: Path) -> None:
    """Write the folder's config, tokenizer and weights.

    Weights keep their dtype (float32, float16 or bfloat16).
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"{folder} has the model type {config['model_type']}; this script writes only llama as GGUF.")
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads

    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, folder, config)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (not a mapping)
            value = weights.get_tensor(name)
            if name.endswith("q_proj.weight"):
                value = interleave_heads(value, heads)
            elif name.endswith("k_proj.weight"):
                value = interleave_heads(value, kv_heads)
            _add_tensor(writer, names.get_name(name, (".weight",)), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_heads(weight: Tensor, heads: int) -> Tensor:
    """Reorder the output channels of a q or k projection for llama.cpp.

    llama.cpp rotates channel 2i with 2i + 1; transformers rotates i with i + half.
    """
    outputs, inputs = weight.shape
    return weight.view(heads, 2, outputs // heads // 2, inputs).transpose(1, 2).reshape(outputs, inputs)


def _add_tensor(writer: gguf.GGUFWriter, name: str, value: Tensor) -> None:
    if value.dim() == 1:  # llama.cpp requires norms in float32
        writer.add_tensor(name, value.float().numpy())
    elif value.dtype == torch.bfloat16:  # numpy has no bfloat16, so write the bytes and name the dtype
        raw = value.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, value.contiguous().numpy())


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    ids = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    tokens = sorted(ids, key=ids.__getitem__)
    if len(tokens) != config["vocab_size"]:
        raise SystemExit(f"{folder}: {len(tokens)} tokens for a vocabulary of {config['vocab_size']}.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_token_types([kinds[index not in special] for index in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
