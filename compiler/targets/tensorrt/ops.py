"""The dialect in the ONNX ops that TensorRT fuses, everything in the dtype computed in."""

from __future__ import annotations

from typing import Any

import torch

from ....ir.weights import cast
from ..onnx import standard
from ..onnx.graph import Value
from ..onnx.lower import Lowering, Table, WeightValue
from ..onnx.scores import attend
from .moe import moe
from .quantized import quant_embedding, quant_linear


def _in(g: Lowering, value: Value, dtype: torch.dtype) -> Value:
    """Return a value in another dtype; a weight is stored in it."""
    if isinstance(value, WeightValue) and value.dtype != dtype:
        return g.weight(f"{value}.{str(dtype).removeprefix('torch.')}", cast(value.weight, dtype))
    return g.cast(value, dtype)


def linear(g: Lowering, x: Value, weight: Value, bias: Value | None) -> str:
    """Multiply by the transposed weight, which stays [O, I]: the profiles of a plan then share one copy of it."""
    y = g.op("MatMul", x, g.op("Transpose", _in(g, weight, x.dtype), perm=[1, 0]))
    return y if bias is None else g.op("Add", y, _in(g, bias, x.dtype))


def cached_attention(
    g: Lowering, k: Value, v: Value, softcap: float | None, k_scales: None, v_scales: None, **call: Any
) -> tuple[str, str, str]:
    """Write an attention; TensorRT has none that caps scores, or whose keys and values differ in width."""
    is_composed = softcap is not None or k.shape[3] != v.shape[3]
    return attend(g, k=k, v=v, softcap=softcap, is_composed=is_composed, **call)


def rope(g: Lowering, x: Value, positions: Value, cos: Value, sin: Value, interleaved: bool) -> str:
    return standard.rope(g, x, positions, _in(g, cos, x.dtype), _in(g, sin, x.dtype), interleaved)


def rms_norm(g: Lowering, x: Value, weight: Value | None, eps: float) -> str:
    return standard.rms_norm(g, x, weight and _in(g, weight, x.dtype), eps)


def layer_norm(g: Lowering, x: Value, weight: Value | None, bias: Value | None, eps: float) -> str:
    # Without a bias, TensorRT's parser would add one of its own.
    shift = g.constant(torch.zeros(x.shape[-1], dtype=x.dtype)) if bias is None else _in(g, bias, x.dtype)
    return standard.layer_norm(g, x, weight and _in(g, weight, x.dtype), shift, eps)


def add_rms_norm(g: Lowering, x: Value, residual: Value, weight: Value | None, eps: float) -> tuple[str, str]:
    return standard.add_rms_norm(g, x, residual, weight and _in(g, weight, x.dtype), eps)


TENSORRT: Table = standard.STANDARD | {
    "llmc.add_rms_norm": add_rms_norm,
    "llmc.cached_attention": cached_attention,
    "llmc.layer_norm": layer_norm,
    "llmc.linear": linear,
    "llmc.moe": moe,
    "llmc.quant_embedding": quant_embedding,
    "llmc.quant_linear": quant_linear,
    "llmc.rms_norm": rms_norm,
    "llmc.rope": rope,
}
