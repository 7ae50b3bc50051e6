"""The tensors that a quantized checkpoint holds for one linear, and the refusals of those that don't fit."""

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
    """What the checkpoint holds for one linear: tensors by what they are called behind its name."""

    format: str
    name: str
    tensors: Mapping[str, Leaf]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def need(self, part: str, shape: Sequence[int] | None = None, dtypes: Sequence[torch.dtype] = ()) -> Leaf:
        """A tensor that must be there, of that shape, and of one of these dtypes."""
        if part not in self.tensors:
            raise LlmcError(
                "WEIGHTS_MISSING",
                f"The {self.format} checkpoint holds codes for {self.name} but no {self.name}.{part}.",
                "Fetch the checkpoint again; a shard may be missing.",
            )
        leaf = self.tensors[part]
        if shape is not None and leaf.shape != tuple(shape):
            raise self.mismatch(part, f"its shape is {leaf.shape}, the codes ask for {tuple(shape)}")
        if dtypes and leaf.dtype not in dtypes:
            raise self.mismatch(part, f"its dtype is {_short(leaf.dtype)}, not {' or '.join(map(_short, dtypes))}")
        return leaf

    def matrix(self, part: str, dtypes: Sequence[torch.dtype]) -> Leaf:
        """A tensor of two dims that must be there."""
        leaf = self.need(part, dtypes=dtypes)
        if len(leaf.shape) != 2:
            raise self.mismatch(part, f"its shape is {leaf.shape}, which is no matrix")
        return leaf

    def mismatch(self, part: str, what: str) -> LlmcError:
        """The refusal of a tensor that doesn't fit the others."""
        return LlmcError(
            "WEIGHTS_MISMATCH",
            f"{self.name}.{part} of the {self.format} checkpoint can't be read: {what}.",
            "The checkpoint and its quantization_config don't belong together, or a file is damaged.",
        )


@dataclass(frozen=True)
class Format:
    """How a checkpoint is quantized.

    Attributes:
        name: its quant_method.
        marks: names behind a linear's name that only a quantized linear has.
        others: further names of tensors that belong to one.
        read: the weight of a linear from its tensors.
    """

    name: str
    marks: tuple[str, ...]
    others: tuple[str, ...]
    read: Callable[[Parts], Weight]


def unreadable(what: str) -> LlmcError:
    """The refusal of a way to quantize that no reader knows."""
    return LlmcError(
        "CHECKPOINT_QUANTIZED", what, "Give the model as it was before it was quantized; llmc quantizes it itself."
    )


def entry(config: Mapping[str, Any], key: str, default: Any, kind: type) -> Any:
    """A value of the quantization_config, which must be of a kind."""
    value = config.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise unreadable(f"The quantization_config's {key} is {value!r}, which is no {kind.__name__}.")
    return value


def group_of(config: Mapping[str, Any]) -> int:
    """Inputs that share a scale: -1 for all, else 1 or more."""
    size: int = entry(config, "group_size", 128, int)
    if size != -1 and size < 1:
        raise unreadable(f"The quantization_config's group_size is {size}.")
    return size


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
