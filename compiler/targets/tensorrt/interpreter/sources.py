"""Layers that make values: constants and sequences of numbers."""

from __future__ import annotations

import numpy as np

from .call import Call, along, integers
from .dtypes import numpy_dtype


def constant(call: Call) -> np.ndarray:
    """Return the weights; those whose dtype numpy lacks come from the constants of the call."""
    tensor, weights = call.outputs[0], call.layer.weights
    shape = tuple(call.layer.shape)
    if isinstance(weights, np.ndarray):
        return weights.reshape(shape)
    for name in (call.layer.name, tensor.name):
        if name in call.constants:
            value = call.constants[name]
            break
    else:
        raise KeyError(f"TensorRT does not return the {tensor.dtype.name} values of {call.name}; pass them as constant")
    if value.dtype != numpy_dtype(tensor) or value.shape != shape:
        raise ValueError(f"its constant is {value.dtype} {value.shape}, instead of {tensor.dtype.name} {shape}")
    return value


def fill(call: Call) -> np.ndarray:
    """Return alpha + sum of beta[d] * (index along dimension d)."""
    layer = call.layer
    if layer.operation.name != "LINSPACE":
        raise call.refuse(f"random numbers ({layer.operation.name})")
    sizes, start, steps = (call.optional(i) for i in range(3))
    shape = tuple(layer.shape) if sizes is None else tuple(integers(sizes))
    dtype = numpy_dtype(call.outputs[0])
    value = np.zeros(shape, dtype) + (dtype.type(layer.alpha) if start is None else start)
    steps = np.array([layer.beta], dtype) if steps is None else steps.reshape(-1)
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        value = value + (np.arange(size, dtype=dtype) * step).reshape(along(axis, len(shape)))
    return value


def assertion(call: Call) -> tuple[np.ndarray, ...]:
    """Raise an error if an element is false."""
    if not np.all(call.input(0)):
        raise AssertionError(call.layer.message)
    return ()
