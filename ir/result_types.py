"""Shapes and dtypes of the results of calls, inferred once for each kind of call.

Running an op on the meta device takes milliseconds, and the weights of a model are thousands of calls on a few shapes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_CAPACITY = 4096
_known: dict[Hashable, list[TensorType]] = {}


@dataclass(frozen=True)
class TensorType:
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def meta(self) -> torch.Tensor:
        """Return a tensor of this type on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def result_types(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[TensorType]:
    """Return the types of all results of a call.

    Args:
        args: the arguments, with a `TensorType` in place of each tensor.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    # `repr` tells 1 from 1.0 and True, which are equal.
    key = (target, structure, tuple(leaf if isinstance(leaf, TensorType) else repr(leaf) for leaf in leaves))
    if key not in _known:
        if len(_known) >= _CAPACITY:
            _known.clear()
        _known[key] = _infer(target, args, kwargs)
    return _known[key]


def _infer(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[TensorType]:
    args, kwargs = pytree.tree_map(lambda x: x.meta() if isinstance(x, TensorType) else x, (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "meta"}
    with torch.no_grad():
        results = target(*args, **kwargs)
    values = [results] if isinstance(results, torch.Tensor) else results
    return [TensorType(tuple(value.shape), value.dtype) for value in values]
