"""Random weights without constant parameters, such as all zeros or all ones."""

from __future__ import annotations

import re

import torch
from torch import nn

# Decay parameters of recurrences. They must keep their sign and size, so they are the family's own init plus noise.
_DECAY = re.compile(r"A_log|dt_bias|time_decay|a_param|\bD$|igate|fgate")
_NOISE = 0.2


def randomize(model: nn.Module, seed: int) -> None:
    """Fill `model` in place with random weights.

    Matrices get random values of unit gain, everything else its own init plus noise.

    With init plus noise, a vector keeps its purpose: a norm weight stays near one, or near zero if the model adds
    one. Ignoring the vector still changes the result.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    persistent = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in persistent.items():
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            is_parameter = isinstance(tensor, nn.Parameter)
            constant = bool((tensor == tensor.flatten()[0]).all())
            if is_parameter and tensor.ndim >= 2 and not constant and not _DECAY.search(name):
                tensor.copy_(normal(tensor) * _fan_in(model, name, tensor) ** -0.5)
            elif is_parameter or (constant and tensor.abs().max() < 1e3):  # a huge constant is a mask, not a weight
                tensor.add_(normal(tensor) * _NOISE)


def _fan_in(model: nn.Module, name: str, tensor: torch.Tensor) -> int:
    owner = model.get_submodule(name.rpartition(".")[0])
    if type(owner).__name__ == "Conv1D":  # GPT-2's linear, stored transposed
        return tensor.shape[0]
    return tensor[0].numel() if isinstance(owner, nn.Conv1d | nn.Conv2d) else tensor.shape[-1]
