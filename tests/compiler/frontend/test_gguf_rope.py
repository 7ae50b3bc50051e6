"""Rope divisors of a GGUF file become the llama3 scaling that they come from, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmc.compiler.frontend.gguf_rope import restore_rope_scaling
from llmc.errors import LlmcError

PATH = Path("m.gguf")
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}


def llama(**rope: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=rope)


def plain() -> LlamaConfig:
    return llama(rope_type="default", rope_theta=500000.0)


def frequencies(config: LlamaConfig) -> torch.Tensor:
    return ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]


def divisors(config: LlamaConfig) -> torch.Tensor:
    """Return the tensor that a converter writes for ``config``."""
    return 500000.0 ** (-torch.arange(64) / 64) / frequencies(config)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_become_the_llama3_scaling_that_they_come_from(factor: float) -> None:
    scaled = llama(**LLAMA3, factor=factor)
    config = restore_rope_scaling(PATH, plain(), {"general.architecture": "llama"}, divisors(scaled))
    assert config.rope_parameters["factor"] == pytest.approx(factor, rel=1e-6)
    torch.testing.assert_close(frequencies(config), frequencies(scaled), rtol=1e-6, atol=0)


@pytest.mark.parametrize("divisors", [None, torch.ones(64)])
def test_divisors_of_one_change_nothing(divisors: torch.Tensor | None) -> None:
    config = restore_rope_scaling(PATH, plain(), {"general.architecture": "llama"}, divisors)
    assert config.rope_parameters == plain().rope_parameters


@pytest.mark.parametrize(
    ("config", "metadata", "divisors", "message"),
    [
        (plain(), {}, torch.linspace(1, 8, 64), "not those of the llama3"),
        (plain(), {}, torch.linspace(1, 8, 32), "not those of the llama3"),
        (plain(), {"llama.rope.scaling.type": "yarn"}, None, "type yarn"),
        (Gemma3TextConfig(), {"llama.rope.scaling.type": "linear"}, None, "type linear"),
        (Gemma3TextConfig(), {}, torch.full((64,), 2.0), "already per layer"),
        (llama(**LLAMA3, factor=8.0), {}, torch.full((64,), 2.0), "already llama3"),
    ],
)
def test_a_scaling_that_can_not_be_restored_is_an_error(
    config: Any, metadata: dict[str, Any], divisors: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(LlmcError, match=f"GGUF_ROPE.*{message}"):
        restore_rope_scaling(PATH, config, {"general.architecture": "llama", **metadata}, divisors)


def per_layer() -> Gemma3TextConfig:
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    return Gemma3TextConfig(rope_parameters={"full_attention": linear, "sliding_attention": plain})


@pytest.mark.parametrize(
    "config",
    [llama(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=8192), per_layer()],
    ids=["whole", "per layer"],
)
def test_a_declared_scaling_that_transformers_reads_is_accepted(config: Any) -> None:
    metadata = {"general.architecture": "llama", "llama.rope.scaling.type": "as declared"}
    assert restore_rope_scaling(PATH, config, metadata, None) is config
