"""The dialect in the ONNX ops that TensorRT fuses, everything in the dtype computed in."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ....kernels.ops import cached_attention as cached_attention_op
from ....passes.queries import arguments, is_op
from ..onnx import standard
from ..onnx.graph import Value
from ..onnx.lower import Lowering, Table
from ..onnx.scores import attend
from .moe import moe
from .quantized import quant_embedding, quant_linear


def linear(g: Lowering, x: Value, weight: Value, bias: Value | None) -> str:
    """Multiply by the transposed weight, which stays [O, I]: the profiles of a plan then share one copy of it."""
    y = g.op("MatMul", x, g.op("Transpose", g.convert(weight, x.dtype), perm=[1, 0]))
    return y if bias is None else g.op("Add", y, g.convert(bias, x.dtype))


def cached_attention(
    g: Lowering, k: Value, v: Value, softcap: float | None, k_scales: None, v_scales: None, **call: Any
) -> tuple[str, str, str]:
    """Write an attention; TensorRT has none that caps scores, or whose keys and values differ in width.

    Two of the same queries crash TensorRT for RTX 1.7 while it builds.
    """
    is_composed = softcap is not None or k.shape[3] != v.shape[3] or _shares_queries(g.node)
    return attend(g, k=k, v=v, softcap=softcap, is_composed=is_composed, **call)


def _shares_queries(node: fx.Node) -> bool:
    queries = arguments(node)["q"]
    return sum(is_op(user, cached_attention_op) for user in queries.users) > 1


def layer_norm(g: Lowering, x: Value, weight: Value | None, bias: Value | None, eps: float) -> str:
    # Without a bias, TensorRT's parser would add one of its own.
    shift = g.constant(torch.zeros(x.shape[-1], dtype=x.dtype)) if bias is None else bias
    return standard.layer_norm(g, x, weight, shift, eps)


TENSORRT: Table = standard.STANDARD | {
    "llmc.cached_attention": cached_attention,
    "llmc.layer_norm": layer_norm,
    "llmc.linear": linear,
    "llmc.moe": moe,
    "llmc.quant_embedding": quant_embedding,
    "llmc.quant_linear": quant_linear,
}
