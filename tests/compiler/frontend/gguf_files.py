"""Small GGUF files for tests, written as a converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType, quants
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llmc.compiler.frontend.gguf import GgufFile
from llmc.ir.stored import stored_codes, why_dequantized

Tensors = dict[str, np.ndarray]
T = GGMLQuantizationType

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPELLED = list(bytes_to_unicode().values())
VOCABULARY = ["<|pad|>", "<|im_start|>", "<|im_end|>", *SPELLED, "he", "ll", "Ġw"]


def write(
    path: Path,
    arch: str,
    metadata: dict[str, float],
    tensors: Tensors,
    stored: T = T.F32,
    types: Mapping[str, T] | None = None,
) -> GgufFile:
    """Write and open a GGUF file.

    Args:
        stored: the type of matrices. Vectors keep the dtype of their array.
        types: other types of single matrices, by GGUF name.
    """
    writer = GGUFWriter(path, arch)
    writer.add_name("Tiny")
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["h e", "l l", "Ġ w"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, value in tensors.items():
        kind = (types or {}).get(name, stored)
        if value.ndim == 1 or kind == T.F32:
            writer.add_tensor(name, value)
        elif kind == T.F16:
            writer.add_tensor(name, value.astype(np.float16))
        else:
            writer.add_tensor(name, _encoded(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def _encoded(value: np.ndarray, kind: T) -> np.ndarray:
    if kind == T.BF16:
        return (value.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    try:
        return quants.quantize(value, kind)
    except NotImplementedError:  # the package only decodes this type
        block, size = GGML_QUANT_SIZES[kind]
        # Every byte pair is a finite float16, for some types hold scales there.
        count = value.size // block * size
        blocks = np.random.default_rng(0).integers(0, 0x30, count, np.uint8)
        return blocks.reshape(*value.shape[:-1], -1)


def rope_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the halves of each head along the output channels, as llama's q and k are stored."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def random_model(config: PreTrainedConfig) -> tuple[PreTrainedModel, Tensors]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).to(torch.bfloat16))
    return model, {name: value.numpy() for name, value in model.state_dict().items()}


LLAMA = LlamaConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=0.5,
    rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    max_position_embeddings=99,
)
LLAMA_METADATA = {
    "block_count": 2,
    "context_length": 99,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 0.5,
    "rope.freq_base": 777.0,
    "rope.dimension_count": 8,
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}


def gguf_name(name: str, layer: dict[str, str] = LAYER) -> str:
    module, _, kind = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    _, _, index, inner = module.split(".", 3)
    return f"blk.{index}.{layer[inner]}.{kind}"


def llama_tensors(weights: Tensors) -> Tensors:
    heads = {"q_proj": 4, "k_proj": 2}
    return {
        gguf_name(name): rope_rows(value, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else value
        for name, value in weights.items()
    }


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


def check_codes(file: GgufFile, model: PreTrainedModel) -> dict[str, str | None]:
    """Check the values of kept codes. Return the scheme of each matrix, or why its codes are not kept."""
    sources, found = file.hf_tensors(model), {}
    for name, weight in file.hf_weights(model).items():
        if (stored := stored_codes(weight)) is not None:
            assert torch.equal(stored.evaluate(), sources[name].read()), name
        if weight.numel > weight.shape[-1]:
            found[name] = stored.scheme if stored else why_dequantized(weight)
    return found


def check_read_back(file: GgufFile, model: PreTrainedModel) -> PreTrainedConfig:
    config = file.config()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert type(empty) is type(model)
    sources = file.hf_tensors(empty)
    assert set(sources) == set(model.state_dict())
    for name, expected in model.state_dict().items():
        value = sources[name].read()
        assert value.dtype == sources[name].dtype and tuple(value.shape) == sources[name].shape, name
        assert torch.equal(value.float(), expected), name
    return config
