"""Store a quantized embedding that is also the LM head once.

Kernels that multiply with codes read them as [inputs, outputs]. TensorRT would keep that beside the [outputs, inputs]
that the embedding looks up, in small models a third of all weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .network import Network, makers_of, skip_reshapes


def share_embedding(network: Network) -> None:
    """Rewrite Gather(w, ids) and MatMul(x, Transpose(w)) of the same int8 codes, so that both read them transposed.

    A lookup then reads a column, which is more memory traffic for a few tokens, and a copy of the weight less.
    """
    makers = makers_of(network)
    for gather in network.layers:
        if gather.type.name != "GATHER" or gather.axis != 0:
            continue
        dequantize = makers.get(gather.get_input(0).name)
        constant = _codes(dequantize, makers)
        if constant is None:
            continue
        products = [one for one in network.layers if _multiplies(network, one, constant, makers)]
        if products:
            _read_transposed(network, gather, dequantize, constant, products)


def _codes(dequantize: Any, makers: dict[str, Any]) -> Any | None:
    """Return the constant of int8 codes with a scale for each output channel that a layer dequantizes, or None."""
    if dequantize is None or dequantize.type.name != "DEQUANTIZE" or dequantize.axis != 0:
        return None
    constant = makers.get(dequantize.get_input(0).name)
    if constant is None or constant.type.name != "CONSTANT" or constant.get_output(0).dtype.name != "INT8":
        return None
    is_matrix = len(constant.get_output(0).shape) == 2 and len(dequantize.get_input(1).shape) == 1
    return constant if is_matrix else None


def _multiplies(network: Network, layer: Any, constant: Any, makers: dict[str, Any]) -> bool:
    if layer.type.name != "MATRIX_MULTIPLY" or layer.op1 != network.library.module.MatrixOperation.TRANSPOSE:
        return False
    source = skip_reshapes(layer.get_input(1), makers)
    return bool(
        source is not None
        and source.type.name == "DEQUANTIZE"
        and source.get_input(0).name == constant.get_output(0).name
    )


def _read_transposed(network: Network, gather: Any, dequantize: Any, constant: Any, products: list[Any]) -> None:
    module = network.library.module
    channels, width = constant.get_output(0).shape
    codes = np.ascontiguousarray(np.asarray(constant.weights).reshape(channels, width).T)
    network.constants.append(codes)
    stored = network.add("constant", (width, channels), module.Weights(codes))
    stored.name = f"{constant.name}.transposed"
    weight = network.add("dequantize", stored.get_output(0), dequantize.get_input(1), dequantize.get_output(0).dtype)
    weight.axis = 1
    weight.name = f"{dequantize.name}.transposed"
    for product in products:
        reshape = network.add("shuffle", weight.get_output(0))
        reshape.reshape_dims = (*product.get_input(1).shape[:-2], width, channels)
        product.set_input(1, reshape.get_output(0))
        product.op1 = module.MatrixOperation.NONE
    users = network.users(gather.get_output(0))
    rank = len(gather.get_input(1).shape)
    gather.set_input(0, weight.get_output(0))
    gather.axis = 1
    turned = network.add("shuffle", gather.get_output(0))
    turned.first_transpose = (*range(1, rank + 1), 0)
    turned.name = f"{gather.name}.transposed"
    for user, index in users:
        user.set_input(index, turned.get_output(0))
