"""Artifacts of tiny models, each compiled once per process. Tests must copy an artifact to change it."""

from __future__ import annotations

import functools
import string
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo.tiny import tiny_model

import llmc

_HOME = tempfile.TemporaryDirectory(prefix="compiled-")
GENERATION = '{"eos_token_id": [2], "pad_token_id": 0,   "temperature": 0.5}'
CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"


@functools.cache
def artifact(model_type: str, **options: Any) -> Path:
    """Return the artifact of a tiny model; "speaking" is a llama on disk with a tokenizer."""
    folder = Path(_HOME.name) / "-".join([model_type, *(f"{k}={v}" for k, v in sorted(options.items()))])
    with torch.random.fork_rng(devices=[]):
        llmc.compile(speaking_model() if model_type == "speaking" else tiny_model(model_type), folder, **options)
    return folder


@functools.cache
def speaking_model() -> Path:
    """Return the folder of a llama with a tokenizer of single letters and a chat template."""
    folder = Path(_HOME.name) / "model"
    tiny_model("llama").save_pretrained(folder)
    letters = ["<pad>", "<s>", "</s>", " ", *string.printable[:92]]
    made = tokenizers.Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    wrapped.save_pretrained(folder)
    (folder / "generation_config.json").write_text(GENERATION)
    return folder
