"""Quantize and dequantize keys and values in a program without caches, as an 8-bit cache would."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.program import Program
from ...kernels.ops import attention, op_of
from ...kernels.ops.quantized import CACHE_CODES, dequantize_cached, quantize_cached


def with_quantized_cache(program: Program, codes: str) -> Program:
    """Return a copy whose attentions use quantized and dequantized keys and values.

    It serves as a reference and can't be compiled. It has no slots, starts or cache masks, so a comparison reveals
    errors in those of the cached program.

    Args:
        codes: "int8" or "fp8".
    """
    copy = program.copy()
    for node in copy.nodes:
        if op_of(node.target) is not attention:
            continue
        call = attention.bind(node.args, dict(node.kwargs))
        with copy.graph.inserting_before(node):
            for name in ("k", "v"):
                call[name] = copy.graph.call_function(_quantized, (call[name], CACHE_CODES[codes]))
        node.args, node.kwargs = (), call
    return copy


def _quantized(x: Tensor, codes: torch.dtype) -> Tensor:
    return dequantize_cached(*quantize_cached(x, codes)).to(x.dtype)
