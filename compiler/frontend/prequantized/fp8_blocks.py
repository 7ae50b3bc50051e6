"""Readers of FP8 checkpoints.

A scale belongs to a block (as in DeepSeek's checkpoints), an output channel, or the tensor.

    weight             float8_e4m3fn [O, I]
    weight_scale_inv   float [O/128, I/128] or one element   (fp8; powers of two may be stored as exponents)
    weight_scale       float [O, 1]                          (fbgemm_fp8)

Under either name, the weight is codes times scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ....ir.weights import Leaf, Weight, transpose
from .groups import from_groups
from .layout import expression, repeated, wide
from .parts import FLOATS, Format, Parts, unreadable

FP8 = (torch.float8_e4m3fn,)
_SCALES = (*FLOATS, torch.float8_e8m0fnu)


def open_fp8(config: Mapping[str, Any]) -> Format:
    """Return the reader for a `quantization_config` of fp8."""
    if config.get("expert_dtype", "fp8") != "fp8":
        raise unreadable(f"The checkpoint stores experts as {config['expert_dtype']!r}; llmc reads fp8.")
    block = config.get("weight_block_size", (128, 128))
    if block is not None and not is_block(block):
        raise unreadable(f"The quantization_config's weight_block_size is {block!r}.")

    def read(parts: Parts) -> Weight:
        return blocks(parts, parts.matrix("weight", FP8), "weight_scale_inv", block)

    return Format("fp8", ("weight_scale_inv",), ("weight",), read)


def open_fbgemm(config: Mapping[str, Any]) -> Format:
    """Return the reader for a `quantization_config` of fbgemm_fp8."""

    def read(parts: Parts) -> Weight:
        weight = parts.matrix("weight", FP8)
        return blocks(parts, weight, "weight_scale", (1, weight.shape[1]))

    return Format("fbgemm_fp8", ("weight_scale",), ("weight",), read)


def is_block(block: Any) -> bool:
    """True if a config's value is the height and width of a block."""
    return isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)


def blocks(parts: Parts, weight: Leaf, part: str, block: Sequence[int] | None) -> Weight:
    """Build the weight of codes [O, I] with one scale per block.

    Args:
        parts: the linear's tensors.
        weight: the codes.
        part: name of the tensor of scales.
        block: height and width of a block; None if the whole weight is one block.
    """
    outputs, inputs = weight.shape
    height, width = block or (outputs, inputs)
    shape = (-(-outputs // height), -(-inputs // width))
    scales = parts.need(part, dtypes=_SCALES)
    if scales.numel != shape[0] * shape[1] or (block is not None and scales.shape != shape):
        raise parts.mismatch(part, f"its shape is {scales.shape}, but blocks of {height} x {width} require {shape}")
    by_block = expression(lambda x: x.view(shape), wide(scales))
    by_output = transpose(repeated(transpose(by_block), height, outputs))
    return from_groups(parts, weight, by_output, None, "fp8", width)
