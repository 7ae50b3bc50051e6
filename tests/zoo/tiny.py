"""One tiny random model for each type of causal language model in transformers."""

from __future__ import annotations

import inspect
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .facts import UNBUILDABLE, WRONG_POSITION_IDS
from .shrink import FIRST_TOKEN, LAST_TOKEN, shrink
from .weights import randomize

__all__ = ["UNBUILDABLE", "Forward", "forward_ok", "tiny_config", "tiny_model", "tiny_model_types"]


@dataclass(frozen=True)
class Forward:
    """The result of an eager forward.

    Attributes:
        logits: float32 [B, S, V].
        causal: True if logits don't depend on later tokens.
        takes_position_ids: True if the model was called with position_ids.
    """

    logits: torch.Tensor
    causal: bool
    takes_position_ids: bool


def tiny_model_types() -> list[str]:
    """All model types of transformers' causal LM mapping, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that transformers maps `model_type` to for causal LM."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    assert isinstance(found, type), f"{model_type} maps to {found}"
    return found


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A tiny config for `model_class(model_type)`.

    If the class takes only the text config, it is that part.
    """
    default = CONFIG_MAPPING[model_type]()
    accepted = model_class(model_type).config_class or PreTrainedConfig
    if not isinstance(default, accepted):
        default = next((part for part in vars(default).values() if isinstance(part, accepted)), default)
    return shrink(default)


def tiny_model(model_type: str) -> PreTrainedModel:
    """Build the tiny model of a type, with the same weights on every call.

    It is in float32 and eval mode.
    """
    seed = zlib.crc32(model_type.encode())
    config = tiny_config(model_type)
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Only eager attention supports all features of all families, including softcaps and sinks.
        model = model_class(model_type)._from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def forward_ok(model_type: str, model: PreTrainedModel | None = None) -> Forward:
    """Run the tiny model on tokens [2, 13].

    A second run with another last token tests if the model is causal.
    """
    model = tiny_model(model_type) if model is None else model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(FIRST_TOKEN, LAST_TOKEN, (2, 13), generator=generator)
    other = tokens.clone()
    other[:, -1] = FIRST_TOKEN + (other[:, -1] - FIRST_TOKEN + 1) % (LAST_TOKEN - FIRST_TOKEN)
    parameters = inspect.signature(model.forward).parameters
    takes_position_ids = "position_ids" in parameters and model_type not in WRONG_POSITION_IDS
    kwargs: dict[str, Any] = {"position_ids": torch.arange(13).expand(2, 13)} if takes_position_ids else {}
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs["use_cache"] = False
    with torch.no_grad():
        logits = model(input_ids=tokens, **kwargs).logits
        changed = model(input_ids=other, **kwargs).logits
    vocab = model.config.get_text_config(decoder=True).vocab_size
    assert logits.shape == (2, 13, vocab), f"{model_type}: logits {tuple(logits.shape)}, vocabulary {vocab}"
    assert torch.isfinite(logits).all(), f"{model_type}: logits are not finite"
    causal = bool((logits[:, :-1] - changed[:, :-1]).abs().max() < 1e-5)
    return Forward(logits, causal, takes_position_ids)
