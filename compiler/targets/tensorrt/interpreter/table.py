"""The types of layers that the interpreter covers: the interface of each, and how it is evaluated."""

from __future__ import annotations

from typing import NamedTuple

from . import arithmetic, attention, indexing, products, quantized, reductions, sources, views
from .call import Evaluate


class Kind(NamedTuple):
    """A type of layers.

    Attributes:
        interface: the name of its class in the library.
    """

    interface: str
    evaluate: Evaluate


KINDS: dict[str, Kind] = {
    "ACTIVATION": Kind("IActivationLayer", arithmetic.activation),
    "ASSERTION": Kind("IAssertionLayer", sources.assertion),
    "ATTENTION_INPUT": Kind("IAttentionInputLayer", attention.attention_input),
    "ATTENTION_OUTPUT": Kind("IAttentionOutputLayer", attention.attention),
    "CAST": Kind("ICastLayer", arithmetic.same),
    "CONCATENATION": Kind("IConcatenationLayer", views.concatenation),
    "CONSTANT": Kind("IConstantLayer", sources.constant),
    "CONVOLUTION": Kind("IConvolutionLayer", products.convolution),
    "CUMULATIVE": Kind("ICumulativeLayer", reductions.cumulative),
    "DEQUANTIZE": Kind("IDequantizeLayer", quantized.dequantize),
    "EINSUM": Kind("IEinsumLayer", products.einsum),
    "ELEMENTWISE": Kind("IElementWiseLayer", arithmetic.elementwise),
    "FILL": Kind("IFillLayer", sources.fill),
    "GATHER": Kind("IGatherLayer", indexing.gather),
    "IDENTITY": Kind("IIdentityLayer", arithmetic.same),
    "KV_CACHE_UPDATE": Kind("IKVCacheUpdateLayer", attention.kv_cache_update),
    "MATRIX_MULTIPLY": Kind("IMatrixMultiplyLayer", products.matrix_multiply),
    "NON_ZERO": Kind("INonZeroLayer", indexing.non_zero),
    "NORMALIZATION": Kind("INormalizationLayer", reductions.normalization),
    "ONE_HOT": Kind("IOneHotLayer", indexing.one_hot),
    "QUANTIZE": Kind("IQuantizeLayer", quantized.quantize),
    "REDUCE": Kind("IReduceLayer", reductions.reduce),
    "ROTARY_EMBEDDING": Kind("IRotaryEmbeddingLayer", attention.rotary_embedding),
    "SCATTER": Kind("IScatterLayer", indexing.scatter),
    "SELECT": Kind("ISelectLayer", arithmetic.select),
    "SHAPE": Kind("IShapeLayer", views.shape),
    "SHUFFLE": Kind("IShuffleLayer", views.shuffle),
    "SLICE": Kind("ISliceLayer", views.slice_),
    "SOFTMAX": Kind("ISoftMaxLayer", reductions.softmax),
    "SQUEEZE": Kind("ISqueezeLayer", views.squeeze),
    "TOPK": Kind("ITopKLayer", indexing.top_k),
    "UNARY": Kind("IUnaryLayer", arithmetic.unary),
    "UNSQUEEZE": Kind("IUnsqueezeLayer", views.unsqueeze),
}
"""By the name of TensorRT's `LayerType`."""
