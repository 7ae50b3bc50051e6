"""The dialect in the ONNX ops that TensorRT fuses, everything in the dtype computed in."""

from __future__ import annotations

from typing import Any

from ..onnx.graph import Value
from ..onnx.lower import Lowering, Table
from ..onnx.scores import attend
from ..onnx.standard import STANDARD
from .moe import moe
from .quantized import quant_embedding, quant_linear


def linear(g: Lowering, x: Value, weight: Value, bias: Value | None) -> str:
    """Multiply by the transposed weight, which stays [O, I]: the profiles of a plan then share one copy of it."""
    y = g.op("MatMul", x, g.op("Transpose", g.convert(weight, x.dtype), perm=[1, 0]))
    return y if bias is None else g.op("Add", y, g.convert(bias, x.dtype))


def cached_attention(g: Lowering, k_scales: None, v_scales: None, **call: Any) -> tuple[str, str, str]:
    """Write an attention; TensorRT has none that caps scores."""
    return attend(g, fuses_softcap=False, **call)


TENSORRT: Table = STANDARD | {
    "llmc.cached_attention": cached_attention,
    "llmc.linear": linear,
    "llmc.moe": moe,
    "llmc.quant_embedding": quant_embedding,
    "llmc.quant_linear": quant_linear,
}
