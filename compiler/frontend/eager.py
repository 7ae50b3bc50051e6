"""Run the model with transformers' own code, one weight in memory at a time.

It is the reference for all checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...ir.weights import Weight
from .capture import LogitsOf


def eager_logits(module: nn.Module, weights: Mapping[str, Weight], tokens: Tensor) -> Tensor:
    """Compute float32 logits [B, S, V] of whole sequences with the model's own code.

    Args:
        module: the model. Parameters on the meta device get their values from `weights`.
        weights: parameter values by name.
        tokens: int64 [B, S], without padding.
    """
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    with torch.no_grad(), _ReadWhenUsed(module, weights):
        return LogitsOf(module)(tokens, positions).float()


def eager_layers(
    module: nn.Module, weights: Mapping[str, Weight], tokens: Tensor, names: Iterable[str]
) -> dict[str, list[Tensor]]:
    """Record the layer outputs of the named modules for whole sequences.

    Returns, for each name, the floating-point tensors of every call in call order, as float32.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, output: Any) -> None:
        leaves = pytree.tree_leaves(output)
        outputs[name] += [x.float() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]

    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in outputs
    ]
    try:
        eager_logits(module, weights, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


class _ReadWhenUsed(TorchDispatchMode):
    """Replace each meta parameter by its value while an op uses it.

    The value is released after the op.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Weight]) -> None:
        super().__init__()
        parameters = module.named_parameters(remove_duplicate=False)
        self.weights = {id(p): weights[name] for name, p in parameters if p.is_meta and name in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _value(self, tensor: Tensor) -> Tensor:
        weight = self.weights.get(id(tensor))
        return tensor if weight is None else weight.evaluate().to(tensor.dtype)
