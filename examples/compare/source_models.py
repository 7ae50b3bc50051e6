"""Write the models for the comparison as Hugging Face folders.

It also writes the tokens that an engine must generate.

demo      SmolLM2-135M-Instruct, read by llmc's own frontend
moved     the same function with other weights; the demo's are on a 4-bit grid, so all 4-bit methods look perfect
llama-1b  the shape of a 1.1B Llama with random weights from a fixed seed; for speed, not for text
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from protocol import WORKLOAD
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmc.compiler.frontend.sources import find_source

PROMPT = "The three largest oceans of the world are"
CHECKED_TOKENS = 16


def write_demo(folder: Path) -> None:
    _save(_demo(), folder)


def write_moved(folder: Path) -> None:
    model = _demo()
    with torch.no_grad():
        move_scales(model)
    _save(model, folder)


def move_scales(model: LlamaForCausalLM, spread: float = 0.25) -> None:
    """Move random factors between the two sides of channels.

    One side is divided and the other multiplied, so the logits don't change.

    This is done between each norm and the linears that use it, between v and o, and between up and down.
    """
    random = torch.Generator().manual_seed(0)

    def factors(count: int) -> torch.Tensor:
        return torch.exp((2 * torch.rand(count, generator=random) - 1) * spread)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            moved = factors(norm.weight.numel())
            norm.weight /= moved
            for linear in linears:
                linear.weight *= moved
        moved = factors(attention.v_proj.out_features)
        attention.v_proj.weight /= moved[:, None]
        by_head = moved.view(-1, 1, attention.head_dim).expand(-1, attention.num_key_value_groups, -1)
        attention.o_proj.weight *= by_head.reshape(-1)
        moved = factors(mlp.up_proj.out_features)
        mlp.up_proj.weight /= moved[:, None]
        mlp.down_proj.weight *= moved


def _demo() -> LlamaForCausalLM:
    source = find_source("demo")
    model = source.build(torch.float32)
    state = {name: weight.evaluate().float() for name, weight in source.weights(model).items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    find_source("demo").tokenizer().save_pretrained(folder)


def write_llama_1b(folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    find_source("demo").tokenizer().save_pretrained(folder)
    _cut_vocabulary(folder / "tokenizer.json", config.vocab_size)


def _cut_vocabulary(path: Path, size: int) -> None:
    """Keep the first `size` tokens.

    A merged token has a higher id than its parts, so all kept merges are complete.
    """
    tokenizer = json.loads(path.read_text())
    vocab = {token: index for token, index in tokenizer["model"]["vocab"].items() if index < size}
    tokenizer["model"]["vocab"] = vocab
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) in vocab]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


MODELS: dict[str, Callable[[Path], None]] = {"demo": write_demo, "moved": write_moved, "llama-1b": write_llama_1b}


def write_workload(folder: Path, target: Path) -> None:
    """Write the workload for the engines of a model.

    It has the vocabulary size, a prompt, and the greedy tokens of transformers in float32.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = find_source(folder).tokenizer()(PROMPT).input_ids
    check = {"prompt": list(tokens), "expected": []}
    with torch.inference_mode():
        for _ in range(CHECKED_TOKENS):
            check["expected"].append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            tokens = [*tokens, check["expected"][-1]]
    (target / WORKLOAD).write_text(json.dumps({"vocab_size": model.config.vocab_size, "check": check}))
