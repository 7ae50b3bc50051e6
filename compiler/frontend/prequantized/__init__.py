"""Readers of quantized checkpoints that keep codes and scales unchanged.

A reader turns the tensors of one linear into one lazy weight, under the name that the weight has in a plain
checkpoint. `evaluate()` returns the dequantized values; `stored_codes` returns the codes, scales and zero points.
No quantization package is needed. The tensors that a checkpoint contains show which linears are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ....ir.stored import OnlyNumbers, StoredCodes
from ....ir.weights import Leaf, Weight
from .awq import open_awq
from .bitsandbytes import open_bitsandbytes
from .compressed_tensors import open_compressed_tensors
from .fp8_blocks import open_fbgemm, open_fp8
from .gptq import open_gptq
from .parts import Format, Parts, unreadable

__all__ = ["Format", "check_matched", "find_format", "read_weights"]

_FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "awq": open_awq,
    "bitsandbytes": open_bitsandbytes,
    "compressed-tensors": open_compressed_tensors,
    "fbgemm_fp8": open_fbgemm,
    "fp8": open_fp8,
    "gptq": open_gptq,
}
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def find_format(quantization: Any) -> Format:
    """Choose the reader for a `quantization_config`.

    No weight is read.

    Raises:
        LlmcError: ``CHECKPOINT_QUANTIZED`` if no reader supports it.
    """
    if not isinstance(quantization, dict):
        raise unreadable(f"The quantization_config is {quantization!r}, not a JSON object.")
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"  # its oldest checkpoints have no quant_method
    if not isinstance(method, str) or method not in _FORMATS:
        raise unreadable(f"The checkpoint is quantized with {method!r}; llmc reads {', '.join(_FORMATS)}.")
    return _FORMATS[method](quantization)


def read_weights(format: Format, leaves: Mapping[str, Leaf]) -> dict[str, Weight]:
    """Map names of a plain checkpoint to a quantized checkpoint's weights.

    Tensors of linears that are not quantized keep their names and values.
    """
    weights: dict[str, Weight] = {}
    linears: dict[str, dict[str, Leaf]] = {}
    for key, leaf in leaves.items():
        part = next((p for p in (*format.marks, *format.others) if key.endswith(f".{p}")), None)
        if part is None:
            weights[key] = leaf
        else:
            linears.setdefault(key.removesuffix(f".{part}"), {})[part] = leaf
    for name, tensors in linears.items():
        if any(mark in tensors for mark in format.marks) or ("weight" in tensors and _is_code(tensors["weight"])):
            weights[f"{name}.weight"] = format.read(Parts(format.name, name, tensors))
        else:
            weights.update({f"{name}.{part}": leaf for part, leaf in tensors.items()})
    return weights


def check_matched(format: Format, model: nn.Module, matched: Mapping[str, Weight]) -> None:
    """Refuse codes that the model would use wrongly.

    These are codes without scales, which look like plain numbers, and codes of weights that the model stores
    transposed.
    """
    from transformers.pytorch_utils import Conv1D

    for name, value in model.state_dict().items():
        if name not in matched:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if value.is_floating_point() and _is_code(matched[name]):
            dtype = str(matched[name].dtype).removeprefix("torch.")
            raise unreadable(f"The {format.name} checkpoint stores {name} as {dtype}, without scales that llmc knows.")
        if isinstance(owner, Conv1D) and isinstance(matched[name], (StoredCodes, OnlyNumbers)):
            raise unreadable(f"The {format.name} checkpoint has codes for {name}, which the model stores transposed.")


def _is_code(weight: Weight) -> bool:
    return weight.dtype not in _PLAIN
