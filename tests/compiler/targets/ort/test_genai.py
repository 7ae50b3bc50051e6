"""onnxruntime-genai's config describes the graph; unsupported models have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attending import DIM, HEADS, KV_HEADS, MAX_SEQ_LEN, SCALE, VALUE_DIM, Attending, cached, join, qkv
from check_pass import VOCAB
from torch import Tensor

from llmc.compiler.targets.ort.genai import genai_config
from llmc.kernels.ops import attention

CONFIG = {"num_attention_heads": HEADS, "hidden_size": 12, "bos_token_id": 1, "eos_token_id": 2}


def attend(m: Attending, layer: int, x: Tensor, positions: Tensor) -> Tensor:
    return join(attention(*qkv(m, layer, x), SCALE, window=5))


def write(folder: Path, config: dict[str, Any] = CONFIG, generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    return folder


def test_the_config_describes_the_graph(tmp_path: Path) -> None:
    config = genai_config(cached(attend, ring=False), write(tmp_path))
    assert config is not None
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["vocab_size"], model["context_length"]) == (VOCAB, MAX_SEQ_LEN)
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (DIM, KV_HEADS, 2)
    assert (decoder["num_attention_heads"], decoder["hidden_size"], decoder["filename"]) == (HEADS, 12, "model.onnx")
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert config["search"]["past_present_share_buffer"] and config["search"]["max_length"] == MAX_SEQ_LEN


@pytest.mark.parametrize(
    ("generation", "ids"),
    [
        ({}, (1, 2, 2)),
        ({"eos_token_id": [7, 8], "pad_token_id": 0}, (1, [7, 8], 0)),
        ({"eos_token_id": [7, 8]}, (1, [7, 8], 7)),
        ({"bos_token_id": None}, (2, 2, 2)),
    ],
)
def test_special_tokens(tmp_path: Path, generation: dict[str, Any], ids: tuple[Any, ...]) -> None:
    config = genai_config(cached(attend, ring=False), write(tmp_path, generation=generation))
    assert config is not None
    assert tuple(config["model"][f"{name}_token_id"] for name in ("bos", "eos", "pad")) == ids


@pytest.mark.parametrize(("ring", "value_dim"), [(True, DIM), (False, VALUE_DIM)])
def test_rings_and_unequal_dimensions_have_no_config(tmp_path: Path, ring: bool, value_dim: int) -> None:
    assert genai_config(cached(attend, ring, value_dim), write(tmp_path)) is None


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_quantized_caches_have_no_config(tmp_path: Path, codes: str) -> None:
    assert genai_config(cached(attend, ring=False, codes=codes), write(tmp_path)) is None
