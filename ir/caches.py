"""KV caches as inputs and outputs of a program."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.ops.quantized import CACHE_CODES


@dataclass(frozen=True)
class ChannelScales:
    """Constant scales of the codes of keys [heads, key dim] and of values [heads, value dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class CacheInput:
    """One tensor of a KV cache, [B, heads, length, width].

    Attributes:
        name: the name of the program's input.
        role: the content: "key", "value", "key_scale" or "value_scale".
    """

    name: str
    role: str
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Cache:
    """The KV cache of one attention.

    Each tensor of the cache is an input of the program, and has an output with its updated value. In the program they
    are two values; an engine gives both the same memory.

    Attributes:
        keys, values: names of the inputs.
        ring: position p is stored at index p modulo `length`, which is at least `window`; otherwise at index p.
        window: the number of positions that a token attends to, itself included; None for all.
        dtype: the dtype of keys and values, or of their codes.
        key_scales, value_scales: names of the inputs with the scales of codes, one per head and token. None if keys and
            values are not quantized, or if their scales are constants of the program, one per channel.
    """

    keys: str
    values: str
    heads: int
    key_dim: int
    value_dim: int
    length: int
    ring: bool
    window: int | None
    dtype: torch.dtype
    key_scales: str | None = None
    value_scales: str | None = None

    @property
    def is_quantized(self) -> bool:
        """True if keys and values are stored as codes."""
        return self.dtype in CACHE_CODES.values()

    @property
    def slack(self) -> int:
        """How many more positions a ring keeps than its attention sees; 0 if it is not a ring."""
        return self.length - self.window if self.ring and self.window is not None else 0

    @property
    def tensors(self) -> tuple[CacheInput, ...]:
        """The tensors of the cache, in the order of the program's inputs and outputs."""
        tensors = (
            CacheInput(self.keys, "key", self.key_dim, self.dtype),
            CacheInput(self.values, "value", self.value_dim, self.dtype),
        )
        if self.key_scales is None or self.value_scales is None:
            return tensors
        scales = ((self.key_scales, "key_scale"), (self.value_scales, "value_scale"))
        return *tensors, *(CacheInput(name, role, 1, torch.float32) for name, role in scales)
