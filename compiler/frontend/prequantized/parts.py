"""The tensors of one linear in a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....errors import LlmcError
from ....ir.weights import Leaf, Weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Parts:
    """The tensors of one linear, by the part of their name after the linear's name.

    Attributes:
        format: the checkpoint's quant_method, for messages.
        name: the linear's name.
        tensors: the tensors, such as `qweight` for `<name>.qweight`.
    """

    format: str
    name: str
    tensors: Mapping[str, Leaf]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def need(self, part: str, shape: Sequence[int] | None = None, dtypes: Sequence[torch.dtype] = ()) -> Leaf:
        """Return a required tensor, after checking its shape and dtype if they are given."""
        if part not in self.tensors:
            raise LlmcError(
                "WEIGHTS_MISSING",
                f"The {self.format} checkpoint has codes for {self.name} but no {self.name}.{part}.",
                "Download the checkpoint again; a shard may be missing.",
            )
        leaf = self.tensors[part]
        if shape is not None and leaf.shape != tuple(shape):
            raise self.mismatch(part, f"its shape is {leaf.shape}, but the codes require {tuple(shape)}")
        if dtypes and leaf.dtype not in dtypes:
            raise self.mismatch(part, f"its dtype is {_short(leaf.dtype)}, not {' or '.join(map(_short, dtypes))}")
        return leaf

    def matrix(self, part: str, dtypes: Sequence[torch.dtype]) -> Leaf:
        """Return a required tensor of two dims."""
        leaf = self.need(part, dtypes=dtypes)
        if len(leaf.shape) != 2:
            raise self.mismatch(part, f"its shape is {leaf.shape}, not that of a matrix")
        return leaf

    def mismatch(self, part: str, what: str) -> LlmcError:
        """Build the error for a tensor that doesn't fit the linear's other tensors."""
        return LlmcError(
            "WEIGHTS_MISMATCH",
            f"{self.name}.{part} of the {self.format} checkpoint can't be read: {what}.",
            "Check that the quantization_config belongs to this checkpoint, or download its files again.",
        )


@dataclass(frozen=True)
class Format:
    """A quantized checkpoint format and its reader.

    Attributes:
        name: the quant_method.
        marks: name endings of tensors that only a quantized linear has.
        others: name endings of a quantized linear's other tensors.
        read: builds the weight of a linear from its tensors.
    """

    name: str
    marks: tuple[str, ...]
    others: tuple[str, ...]
    read: Callable[[Parts], Weight]


def unreadable(what: str) -> LlmcError:
    """Build the error for a kind of quantization that no reader supports."""
    return LlmcError(
        "CHECKPOINT_QUANTIZED", what, "Pass the model's original checkpoint and set --quantize to quantize it."
    )


def entry(config: Mapping[str, Any], key: str, default: Any, kind: type) -> Any:
    """Return a value of the quantization_config after checking its type."""
    value = config.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise unreadable(f"The quantization_config's {key} is {value!r}, not of type {kind.__name__}.")
    return value


def group_of(config: Mapping[str, Any]) -> int:
    """Return the group size of a quantization_config.

    It is 1 or more, or -1 for one group per output channel.
    """
    size: int = entry(config, "group_size", 128, int)
    if size != -1 and size < 1:
        raise unreadable(f"The quantization_config's group_size is {size}; it must be -1 or at least 1.")
    return size


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
