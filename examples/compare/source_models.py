"""The models that engines are compared on, as Hugging Face folders, and what an engine must say on them.

demo      SmolLM2-135M-Instruct, read by llmc's own frontend
llama-1b  the shape of a 1.1B Llama with random weights from a fixed seed: for speed, not for text
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
    source = find_source("demo")
    model = source.build(torch.float32)
    state = {name: weight.evaluate().float() for name, weight in source.weights(model).items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)


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
    """Keep the first `size` tokens; a merge makes a token later than its parts, so those that are left are whole."""
    tokenizer = json.loads(path.read_text())
    vocab = {token: index for token, index in tokenizer["model"]["vocab"].items() if index < size}
    tokenizer["model"]["vocab"] = vocab
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) in vocab]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


MODELS: dict[str, Callable[[Path], None]] = {"demo": write_demo, "llama-1b": write_llama_1b}


def write_workload(folder: Path, target: Path) -> None:
    """Write what an engine needs beside its model: the vocabulary's size, and what transformers says in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = find_source(folder).tokenizer()(PROMPT).input_ids
    check = {"prompt": list(tokens), "expected": []}
    with torch.inference_mode():
        for _ in range(CHECKED_TOKENS):
            check["expected"].append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            tokens = [*tokens, check["expected"][-1]]
    (target / WORKLOAD).write_text(json.dumps({"vocab_size": model.config.vocab_size, "check": check}))
