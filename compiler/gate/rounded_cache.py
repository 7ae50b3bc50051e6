"""A program without a cache that computes with keys and values as a cache in 8 bits gives them back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.program import Program
from ...kernels.ops import attention, op_of
from ...kernels.ops.quantized import CACHE_CODES, round_rows, rows_of


def with_rounded_keys(program: Program, codes: str) -> Program:
    """A copy whose attentions look at rounded keys and values: to run and compare with, not to compile.

    It shares neither slots nor positions nor masks with what has a cache, so it shows where those are wrong.

    Args:
        codes: "int8" or "fp8".
    """
    made = program.copy()
    for node in made.nodes:
        if op_of(node.target) is not attention:
            continue
        call = attention.bind(node.args, dict(node.kwargs))
        with made.graph.inserting_before(node):
            for name in ("k", "v"):
                call[name] = made.graph.call_function(_rounded, (call[name], CACHE_CODES[codes]))
        node.args, node.kwargs = (), call
    return made


def _rounded(x: Tensor, codes: torch.dtype) -> Tensor:
    return rows_of(*round_rows(x, codes)).to(x.dtype)
