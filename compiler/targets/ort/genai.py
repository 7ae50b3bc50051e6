"""`genai_config.json`, with which onnxruntime-genai can run an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ....ir.nodes import value_of
from ....ir.program import Program


def genai_config(program: Program, folder: Path) -> dict[str, Any] | None:
    """Return the config, or None if onnxruntime-genai cannot run the program.

    It supports only static caches of one shape for all layers, in the dtype of the computation. Nothing is written for
    GPUs, where nobody has run it.

    Args:
        folder: contains the artifact's config.json and generation_config.json.
    """
    caches = program.caches
    first = caches[0]
    uniform = all(
        not c.ring
        and c.dtype is torch.float32
        and (c.heads, c.key_dim, c.value_dim) == (first.heads, first.key_dim, first.key_dim)
        for c in caches
    )
    if not uniform:
        return None
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    ids = {name: generation.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    eos = ids["eos_token_id"][0] if isinstance(ids["eos_token_id"], list) else ids["eos_token_id"]
    heads = config.get("num_attention_heads") or config.get("n_head") or first.heads
    return {
        "model": {
            "type": "llama",
            "context_length": program.max_seq_len,
            "vocab_size": int(value_of(program.output).shape[-1]),
            "bos_token_id": ids["bos_token_id"] if ids["bos_token_id"] is not None else eos,
            "eos_token_id": ids["eos_token_id"],
            "pad_token_id": ids["pad_token_id"] if ids["pad_token_id"] is not None else eos,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": first.key_dim,
                "hidden_size": config.get("hidden_size") or heads * first.key_dim,
                "num_attention_heads": heads,
                "num_hidden_layers": len(caches),
                "num_key_value_heads": first.heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": program.max_seq_len,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
