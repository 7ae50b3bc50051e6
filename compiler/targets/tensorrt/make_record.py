"""From the log of a build to the description of each profile of the plan."""

from __future__ import annotations

from collections.abc import Sequence

from ....runtimes.engines.tensorrt.record import AttentionRecord, CacheRecord, GemmRecord, ProfileRecord
from .build_log import BuildLog, EngineLayer, EngineTensor
from .network import MatMul

_QUANTIZED = ("int8", "int4", "fp8")
_WIDE = ("fp32", "fp16", "bf16")
# Steps of the host, and marks between streams.
_NO_KERNELS = ("shape_call", "signal", "wait")
# Part of the name of every kernel that computes a whole attention.
_FUSED_ATTENTION = "mha"
_CACHE_OUTPUT = "present."


def describe_profiles(
    log: BuildLog, names: Sequence[str], matmuls: Sequence[MatMul], attentions: Sequence[str]
) -> dict[str, ProfileRecord]:
    """Describe each profile.

    Args:
        names: of the profiles, in the plan's order.
        attentions: the names of their nodes.
    """
    activations = [*log.activation_bytes, *[0] * len(names)]
    return {
        name: _describe(
            [layer for layer in log.layers if layer.profile == index], activations[index], matmuls, attentions
        )
        for index, name in enumerate(names)
    }


def _describe(
    layers: Sequence[EngineLayer], activation_bytes: int, matmuls: Sequence[MatMul], attentions: Sequence[str]
) -> ProfileRecord:
    gemms = _gemms(layers, matmuls)
    computed = {node for gemm in gemms for node in gemm.nodes}
    return ProfileRecord(
        sum(layer.kind not in _NO_KERNELS for layer in layers),
        activation_bytes,
        [AttentionRecord(node, _attention_kernel(layers, node)) for node in attentions],
        gemms,
        [matmul.node for matmul in matmuls if matmul.node not in computed],
        _caches(layers),
        _expanded(layers),
    )


def _attention_kernel(layers: Sequence[EngineLayer], node: str) -> str | None:
    return next((one.kernel for one in layers if node in one.nodes and _FUSED_ATTENTION in one.kernel), None)


def _gemms(layers: Sequence[EngineLayer], matmuls: Sequence[MatMul]) -> list[GemmRecord]:
    by_node = {matmul.node: matmul for matmul in matmuls}
    found = []
    for layer in layers:
        members = [by_node[node] for node in layer.nodes if node in by_node]
        weight = _weight(layer, members) if members else None
        if weight is None:
            continue
        first = members[0]
        inputs = [one for one in layer.inputs if one is not weight and one.shape[-1:] == (first.inputs,)]
        # The residual that a kernel adds may have as many channels as its input: the input may be quantized.
        inputs.sort(key=lambda tensor: tensor.dtype not in _QUANTIZED)
        found.append(
            GemmRecord(
                [one.node for one in members],
                first.weight,
                first.input,
                weight.dtype,
                inputs[0].dtype if inputs else "",
                [first.inputs, sum(one.outputs for one in members)],
                layer.kernel,
            )
        )
    return found


def _weight(layer: EngineLayer, members: Sequence[MatMul]) -> EngineTensor | None:
    """Return the weight that a kernel multiplies with.

    None for a kernel that only takes over a step after the multiplication, such as the scale of the result.
    """
    inputs, outputs = members[0].inputs, sum(one.outputs for one in members)
    least = min(inputs * one.outputs for one in members)
    found = [one for one in layer.constants if one.numbers >= least]
    # A weight that another kernel has written out.
    found += [one for one in layer.inputs if sorted(one.shape[-2:]) == sorted((inputs, outputs))]
    return min(found, key=lambda tensor: abs(tensor.numbers - inputs * outputs), default=None)


def _caches(layers: Sequence[EngineLayer]) -> CacheRecord:
    updated: list[str] = []
    copied: dict[str, str] = {}
    read: dict[str, str] = {}
    for layer in layers:
        inputs = {tensor.name: tensor for tensor in layer.inputs if tensor.name.startswith(_CACHE_OUTPUT)}
        for output in layer.outputs:
            if output.name.startswith(_CACHE_OUTPUT):
                if output.name in inputs:
                    updated.append(output.name)
                else:
                    copied[output.name] = layer.kernel
                continue
            for name, tensor in inputs.items():
                if output.numbers_per_entry >= tensor.numbers_per_entry:
                    read.setdefault(name, layer.kernel)
    return CacheRecord([name for name in dict.fromkeys(updated) if name not in copied], copied, read)


def _expanded(layers: Sequence[EngineLayer]) -> dict[str, list[str]]:
    return {
        layer.name: list(layer.nodes)
        for layer in layers
        for weight in layer.constants
        if weight.dtype in _QUANTIZED
        and len([size for size in weight.shape if size > 1]) > 1
        and any(output.dtype in _WIDE and output.numbers >= weight.numbers for output in layer.outputs)
    }
