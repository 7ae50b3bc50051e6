"""Quantize and dequantize keys and values in a program without caches, as an 8-bit cache would."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ir.program import Program
from ...kernels.ops import attention, cached_attention, quant_cached_attention
from ...kernels.ops.quantized import (
    CACHE_CODES,
    dequantize_by_channel,
    dequantize_cached,
    quantize_by_channel,
    quantize_cached,
)
from ...passes.queries import is_op


def with_quantized_cache(program: Program, codes: str, cached: Program | None = None) -> Program:
    """Return a copy whose attentions use quantized and dequantized keys and values.

    It serves as a reference and can't be compiled. It has no slots, starts or cache masks, so a comparison reveals
    errors in those of the cached program.

    Args:
        codes: "int8" or "fp8".
        cached: the same program with caches, whose constant scales are used; None: each token has its own.
    """
    copy = program.copy()
    attentions = [node for node in copy.nodes if is_op(node, attention)]
    by_token = dict.fromkeys(("k", "v"))
    found = [by_token] * len(attentions) if cached is None else _constant_scales(cached)
    for node, scales in zip(attentions, found, strict=True):
        call = attention.bind(node.args, dict(node.kwargs))
        with copy.graph.inserting_before(node):
            for name in ("k", "v"):
                call[name] = copy.graph.call_function(_rounded, (call[name], CACHE_CODES[codes], scales[name]))
        node.args, node.kwargs = (), call
    return copy


def _constant_scales(cached: Program) -> Iterator[dict[str, Tensor | None]]:
    """Return the scales by channel of keys and values for each attention, in order; None if tokens have their own."""
    for node in cached.nodes:
        if is_op(node, quant_cached_attention):
            yield {"k": None, "v": None}
        elif is_op(node, cached_attention):
            call = cached_attention.bind(node.args, dict(node.kwargs))
            yield {name: cached.weights[str(call[f"{name}_scales"].target)].evaluate() for name in ("k", "v")}


def _rounded(x: Tensor, codes: torch.dtype, scales: Tensor | None) -> Tensor:
    if scales is None:
        return dequantize_cached(*quantize_cached(x, codes)).to(x.dtype)
    return dequantize_by_channel(quantize_by_channel(x, scales), scales).to(x.dtype)
