"""The dialect in plain ONNX, for every runtime that supports opset 24."""

from __future__ import annotations

from typing import Any

import torch

from ....ir.weights import transpose
from .activations import gated_act
from .aten import ATEN
from .graph import Value
from .lower import Lowering, Table, WeightValue
from .moe import MOE
from .quantized import standard_embedding, standard_linear
from .quantized_cache import attend as attend_quantized
from .quantized_cache import attend_by_channel
from .scores import attend


def rms_norm(g: Lowering, x: Value, weight: Value | None, eps: float) -> str:
    return g.op("RMSNormalization", x, _gain(g, x, weight), axis=-1, epsilon=eps)


def layer_norm(g: Lowering, x: Value, weight: Value | None, bias: Value | None, eps: float) -> str:
    bias = bias and g.convert(bias, x.dtype)
    return g.op("LayerNormalization", x, _gain(g, x, weight), bias, axis=-1, epsilon=eps)


def _gain(g: Lowering, x: Value, weight: Value | None) -> Value:
    return g.constant(torch.ones(x.shape[-1], dtype=x.dtype)) if weight is None else g.convert(weight, x.dtype)


def add_rms_norm(g: Lowering, x: Value, residual: Value, weight: Value | None, eps: float) -> tuple[str, str]:
    total = g.op("Add", x, residual)
    return g.op("RMSNormalization", total, _gain(g, x, weight), axis=-1, epsilon=eps), total


def linear(g: Lowering, x: Value, weight: Value, bias: Value | None) -> str:
    """Multiply by the transposed weight.

    The weight is stored transposed if it has no other user.
    """
    if isinstance(weight, WeightValue) and not _is_shared(g, weight):
        transposed: Any = g.weight(f"{weight}.transposed", transpose(weight.weight))
    else:
        transposed = g.op("Transpose", weight, perm=[1, 0])
    y = g.op("MatMul", x, transposed)
    return y if bias is None else g.op("Add", y, bias)


def _is_shared(g: Lowering, weight: Value) -> bool:
    """True if the weight has several users, such as the embedding.

    It is then stored once, in the layout of an embedding.
    """
    (node,) = g.program.graph.find_nodes(op="get_attr", target=str(weight))
    return len(node.users) > 1


def cached_attention(
    g: Lowering, ring: bool, k_scales: Value | None, v_scales: Value | None, **call: Any
) -> tuple[str, str, str]:
    """Write an attention over numbers, or over codes with constant scales, which no ring has."""
    if isinstance(k_scales, WeightValue) and isinstance(v_scales, WeightValue):
        return attend_by_channel(g, k_scales=k_scales, v_scales=v_scales, **call)
    return attend(g, ring=ring, **call)


def embedding(g: Lowering, ids: Value, weight: Value) -> str:
    return g.op("Gather", weight, ids, axis=0)


def take_rows(g: Lowering, x: Value, rows: Value) -> str:
    return g.op("Gather", x, rows, axis=1)


def rope(g: Lowering, x: Value, positions: Value, cos: Value, sin: Value, interleaved: bool) -> str:
    """Write a RotaryEmbedding of all or of the first channels of each head."""
    rotated = 2 * cos.shape[-1]
    cos, sin = g.convert(cos, x.dtype), g.convert(sin, x.dtype)
    if rotated == x.shape[-1]:
        return g.op("RotaryEmbedding", x, cos, sin, positions, interleaved=int(interleaved))
    return g.op("RotaryEmbedding", x, cos, sin, positions, interleaved=int(interleaved), rotary_embedding_dim=rotated)


STANDARD: Table = (
    ATEN
    | MOE
    | {
        "llmc.add_rms_norm": add_rms_norm,
        "llmc.cached_attention": cached_attention,
        "llmc.embedding": embedding,
        "llmc.gated_act": gated_act,
        "llmc.layer_norm": layer_norm,
        "llmc.linear": linear,
        "llmc.quant_cached_attention": attend_quantized,
        "llmc.quant_embedding": standard_embedding,
        "llmc.quant_linear": standard_linear,
        "llmc.rms_norm": rms_norm,
        "llmc.rope": rope,
        "llmc.take_rows": take_rows,
    }
)
