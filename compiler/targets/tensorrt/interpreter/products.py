"""Layers that multiply and sum: matrix products, Einstein sums and convolutions."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .call import Call
from .dtypes import widen


def matrix_multiply(call: Call) -> np.ndarray:
    """Multiply matrices, each transposed or not; leading dimensions broadcast."""
    return np.matmul(_operand(call, 0, call.layer.op0), _operand(call, 1, call.layer.op1))


def _operand(call: Call, index: int, operation: Any) -> np.ndarray:
    if operation.name == "VECTOR":
        raise call.refuse("products of vectors")
    x = widen(call.input(index))
    return np.swapaxes(x, -1, -2) if operation.name == "TRANSPOSE" else x


def einsum(call: Call) -> np.ndarray:
    """Evaluate an equation in Einstein's notation."""
    return np.einsum(call.layer.equation, *(widen(call.input(i)) for i in range(len(call.inputs))))


def convolution(call: Call) -> np.ndarray:
    """Convolve [B, C, ...] with a kernel [O, C / groups, ...], in any number of dimensions."""
    x, layer = widen(call.input(0)), call.layer
    if layer.padding_mode.name != "EXPLICIT_ROUND_DOWN":
        raise call.refuse(f"the padding {layer.padding_mode.name}")
    groups, size = layer.num_groups, tuple(layer.kernel_size_nd)
    dims, (batch, channels) = len(size), x.shape[:2]
    kernel = _weights(call, 1, "kernel").reshape(groups, -1, channels // groups, *size)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(layer.pre_padding, layer.post_padding, strict=True)])
    spans = [dilation * (n - 1) + 1 for n, dilation in zip(size, layer.dilation_nd, strict=True)]
    windows = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, step) for step in (*layer.stride_nd, *layer.dilation_nd)]
    windows = windows[(slice(None), slice(None), *steps)]
    grouped = windows.reshape(batch, groups, channels // groups, *windows.shape[2:])
    outer, inner = string.ascii_lowercase[:dims], string.ascii_lowercase[dims : 2 * dims]
    y = np.einsum(f"BGC{outer}{inner},GOC{inner}->BGO{outer}", grouped, kernel, optimize=True)
    y = y.reshape(batch, -1, *y.shape[3:])
    bias = _weights(call, 2, "bias")
    return y + bias.reshape(-1, *[1] * dims) if bias.size else y


def _weights(call: Call, index: int, attribute: str) -> np.ndarray:
    """Return a kernel or bias, which is an input or an attribute."""
    value = call.optional(index)
    if value is None:
        value = getattr(call.layer, attribute)
    if not isinstance(value, np.ndarray):
        raise call.refuse(f"a {attribute} that numpy has no dtype for")
    return widen(value)
