"""Quantize the inputs of linear layers, by a static scale or one per token."""

from __future__ import annotations

import torch
from onnx import TensorProto

from ....kernels.ops.quantized import FLOAT8, SMALLEST_ABSMAX
from .graph import Value
from .lower import Lowering

_ELEMENTS = {"fp8": TensorProto.FLOAT8E4M3FN, "fp8_e5m2": TensorProto.FLOAT8E5M2}


def quantized_input(g: Lowering, x: Value, activation: str, x_scale: Value | None) -> tuple[Value, Value]:
    """Quantize an input to "int8", "fp8" or "fp8_e5m2".

    Returns the codes, in the input's dtype, and their scale.
    """
    if activation == "int8":
        codes, scale = integer_input(g, x, x_scale)
        if ("centred", str(codes)) not in g.memo:
            centred = g.op("Sub", g.cast(codes, x.dtype), g.constant(128.0, x.dtype))
            g.memo["centred", str(codes)] = Value(centred, x.dtype, x.shape)
        return g.memo["centred", str(codes)], scale
    key = (activation, str(x), str(x_scale))
    if key not in g.memo:
        largest = torch.finfo(FLOAT8[activation]).max
        scale = token_scale(g, x, largest) if x_scale is None else x_scale
        limits = g.constant(-largest, x.dtype), g.constant(largest, x.dtype)
        clipped = g.op("Clip", g.op("Div", x, scale), *limits)
        codes = Value(g.op("Cast", clipped, to=_ELEMENTS[activation]), FLOAT8[activation], x.shape)
        g.memo[key] = g.cast(codes, x.dtype), scale
    return g.memo[key]


def integer_input(g: Lowering, x: Value, x_scale: Value | None) -> tuple[Value, Value]:
    """Quantize an input to int8.

    Returns the codes plus 128, as uint8, and their scale: `x_scale`, or one per token.
    """
    key = ("int8", str(x), str(x_scale))
    if key not in g.memo:
        if x_scale is None:
            scale, one = token_scale(g, x, 127.0), g.constant(1.0, x.dtype)
            codes = g.op("QuantizeLinear", g.op("Div", x, scale), one, g.constant(128, torch.uint8))
        else:
            scale = x_scale
            codes = g.op("QuantizeLinear", x, scale, g.constant(128, torch.uint8))
        g.memo[key] = Value(codes, torch.uint8, x.shape), scale
    return g.memo[key]


def token_scale(g: Lowering, x: Value, largest: float) -> Value:
    """Return the scale that maps the largest magnitude of each token to `largest`."""
    farthest = g.op("ReduceMax", g.op("Abs", x), g.constant([-1]), keepdims=1)
    above_zero = g.op("Max", farthest, g.constant(SMALLEST_ABSMAX, x.dtype))
    return Value(g.op("Div", above_zero, g.constant(largest, x.dtype)), x.dtype)
