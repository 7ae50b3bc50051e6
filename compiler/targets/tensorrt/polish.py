"""Rewrite a parsed network so that TensorRT builds a small, fast engine. What the network computes stays the same.

1. MatMul(x, Transpose(w)) becomes MatMul(x, w, TRANSPOSE): the profiles of a plan share weights [outputs, inputs] only.
2. A quantized embedding that is also the LM head is stored once; see embedding.py.
3. Attention multiplies its queries with the whole scale. The parser multiplies queries and keys with the root of it,
   and the keys are the whole cache.
4. MatMul(q, Transpose(keys)) becomes Transpose(MatMul(keys, q, TRANSPOSE)), where attention is written in basic ops and
   the keys are a cache: otherwise each call would write the whole cache transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .embedding import share_embedding
from .network import RESHAPES, Network, makers_of


def polish(network: Network) -> None:
    """Rewrite a parsed network in place; see the top of this module."""
    makers = makers_of(network)
    for layer in network.layers:
        if layer.type.name == "MATRIX_MULTIPLY":
            _transpose_in_matmul(network, layer, makers)
            _multiply_cache_first(network, layer, makers)
        elif layer.type.name == "ATTENTION_INPUT":
            _scale_queries(network, layer, makers)
    share_embedding(network)


def _transpose_in_matmul(network: Network, matmul: Any, makers: dict[str, Any]) -> None:
    operation = network.library.module.MatrixOperation
    weight = matmul.get_input(1)
    chain = list(_reshapes_before(weight, makers))
    source = chain[-1].get_input(0) if chain else weight
    maker = makers.get(source.name)
    if maker is None or maker.type.name not in ("CONSTANT", "DEQUANTIZE") or matmul.op1 != operation.NONE:
        return
    axes = _axes_after(chain, source)
    shape = list(weight.shape)
    last = len(source.shape) - 1
    if axes is None or axes[-2:] != [last, last - 1] or axes[:-2] != sorted(axes[:-2]):
        return
    reshape = network.add("shuffle", source)
    reshape.reshape_dims = (*shape[:-2], shape[-1], shape[-2])
    reshape.name = f"{matmul.name}.weight"
    matmul.set_input(1, reshape.get_output(0))
    matmul.op1 = operation.TRANSPOSE


def _multiply_cache_first(network: Network, matmul: Any, makers: dict[str, Any]) -> None:
    transposed = makers.get(matmul.get_input(1).name)
    if transposed is None or not _swaps_last_axes(transposed):
        return
    keys, queries = transposed.get_input(0), matmul.get_input(0)
    operation = network.library.module.MatrixOperation
    maker = makers.get(keys.name)
    if maker is None or maker.type.name != "KV_CACHE_UPDATE" or (matmul.op0, matmul.op1) != (operation.NONE,) * 2:
        return
    scores = network.add("matrix_multiply", keys, operation.NONE, queries, operation.TRANSPOSE)
    scores.name = f"{matmul.name}.scores"
    back = network.add("shuffle", scores.get_output(0))
    back.first_transpose = transposed.first_transpose
    for user, index in network.users(matmul.get_output(0)):
        user.set_input(index, back.get_output(0))


def _swaps_last_axes(layer: Any) -> bool:
    """Return True for a layer that swaps the last two axes and does nothing else."""
    if layer.type.name != "SHUFFLE" or layer.reshape_dims is not None:
        return False
    rank = len(layer.get_input(0).shape)
    first, second = list(layer.first_transpose), list(layer.second_transpose)
    axes = [first[axis] for axis in second[:rank]]
    return axes == [*range(rank - 2), rank - 1, rank - 2]


def _reshapes_before(tensor: Any, makers: dict[str, Any]) -> Iterator[Any]:
    """Yield the reshapes and transposes that make a tensor, the last one first."""
    layer = makers.get(tensor.name)
    while layer is not None and layer.type.name in RESHAPES:
        yield layer
        layer = makers.get(layer.get_input(0).name)


def _axes_after(chain: list[Any], source: Any) -> list[int] | None:
    """Return the axes of `source` in their order after a chain of layers, without axes of size 1.

    None if the chain splits or joins axes.
    """
    axes = [(axis, size) for axis, size in enumerate(source.shape)]
    for layer in reversed(chain):
        before, after = len(axes), list(layer.get_output(0).shape)
        if min([*after, 0]) < 0:
            return None
        second = list(range(len(after)))
        if layer.type.name == "SHUFFLE":
            axes = [axes[axis] for axis in list(layer.first_transpose)[:before]]
            second = list(layer.second_transpose)[: len(after)]
        reshaped = [0] * len(after)
        for place, axis in enumerate(second):
            reshaped[axis] = after[place]
        kept = [one for one in axes if one[1] != 1]
        if [size for _, size in kept] != [size for size in reshaped if size != 1]:
            return None
        left = iter(kept)
        axes = [next(left) if size != 1 else (-1, 1) for size in reshaped]
        axes = [axes[axis] for axis in second]
    return [axis for axis, size in axes if size != 1]


def _scale_queries(network: Network, layer: Any, makers: dict[str, Any]) -> None:
    queries, query_factor = _without_factor(network, layer.get_input(0), makers)
    keys, key_factor = _without_factor(network, layer.get_input(1), makers)
    if key_factor is None:
        return
    layer.set_input(1, keys)
    factor = key_factor * (1.0 if query_factor is None else query_factor)
    if abs(factor - 1) < 1e-6:
        layer.set_input(0, queries)
        return
    product = network.library.module.ElementWiseOperation.PROD
    scale = network.scalar(factor, len(queries.shape), queries.dtype)
    layer.set_input(0, network.add("elementwise", queries, scale, product).get_output(0))


def _without_factor(network: Network, tensor: Any, makers: dict[str, Any]) -> tuple[Any, float | None]:
    """Return x and the number c if a tensor is x * c, else the tensor and None."""
    layer = makers.get(tensor.name)
    if layer is None or layer.type.name != "ELEMENTWISE":
        return tensor, None
    if layer.op != network.library.module.ElementWiseOperation.PROD:
        return tensor, None
    constant = makers.get(layer.get_input(1).name)
    while constant is not None and constant.type.name in ("CAST", *RESHAPES):
        constant = makers.get(constant.get_input(0).name)
    if constant is None or constant.type.name != "CONSTANT" or constant.get_output(0).dtype.name != "FLOAT":
        return tensor, None
    values = np.asarray(constant.weights)
    return (layer.get_input(0), float(values.ravel()[0])) if values.size == 1 else (tensor, None)
