"""Random weights in which no parameter is trivial: none is all zero, all one or the same everywhere."""

from __future__ import annotations

import re

import torch
from torch import nn

# Recurrences whose decay must keep its sign and size: what the family's own init chose, with noise.
_DECAY = re.compile(r"A_log|dt_bias|time_decay|a_param|\bD$|igate|fgate")
_NOISE = 0.2


def randomize(model: nn.Module, seed: int) -> None:
    """Fill `model` in place: matrices at unit gain, and everything else its own init plus noise.

    Noise on top of the init keeps what a vector means (a norm weight about one, or about zero where the model adds
    the one) and makes leaving it out visible.
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
            elif is_parameter or (constant and tensor.abs().max() < 1e3):  # a mask's huge constant is no weight
                tensor.add_(normal(tensor) * _NOISE)


def _fan_in(model: nn.Module, name: str, tensor: torch.Tensor) -> int:
    owner = model.get_submodule(name.rpartition(".")[0])
    if type(owner).__name__ == "Conv1D":  # GPT-2's linear, stored transposed
        return tensor.shape[0]
    return tensor[0].numel() if isinstance(owner, nn.Conv1d | nn.Conv2d) else tensor.shape[-1]
