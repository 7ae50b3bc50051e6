"""Rope scalings of GGUF files that transformers' tables do not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...errors import LlmcError

ROPE_FREQS = "rope_freqs.weight"
# Converters write only the resulting divisors. All published models with this scaling use these parameters.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def restore_rope_scaling(
    path: Path, config: PreTrainedConfig, metadata: dict[str, Any], divisors: torch.Tensor | None
) -> PreTrainedConfig:
    """Return ``config`` with the rope scaling that the file's divisors define.

    Without the scaling the model would run with subtly wrong results, so a scaling that can't be restored is an error.

    Args:
        path: the file, for error messages.
        config: the config that transformers read from the metadata.
        metadata: the file's metadata.
        divisors: the file's ``rope_freqs.weight``: the divisor of each rotary frequency. None if it has no such tensor.

    Raises:
        LlmcError: ``GGUF_ROPE`` if the scaling can't be restored.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    declared = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    if declared != "none" and kinds <= {"default"}:
        raise _unrestorable(path, f"transformers does not read its rope scaling of type {declared}")
    if divisors is None or bool((divisors == 1).all()):
        return config
    if rope.get("rope_type") != "default":
        raise _unrestorable(path, f"{ROPE_FREQS} scales a rope that is already {rope.get('rope_type', 'per layer')}")

    plain = 1.0 / rope["rope_theta"] ** (torch.arange(divisors.numel()) / divisors.numel())
    config.rope_parameters = {**rope, **_LLAMA3, "rope_type": "llama3", "factor": float(divisors.max())}
    restored, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if restored.shape != plain.shape or not torch.allclose(restored, plain / divisors, rtol=1e-5, atol=0):
        raise _unrestorable(path, f"the divisors in {ROPE_FREQS} are not those of the llama3 scaling")
    return config


def _unrestorable(path: Path, what: str) -> LlmcError:
    return LlmcError("GGUF_ROPE", f"{path}: {what}.", "Use the checkpoint in its safetensors form.")
