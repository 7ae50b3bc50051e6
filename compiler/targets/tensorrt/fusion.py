"""Find the attentions that TensorRT has no single kernel for, by building each kind of them alone.

An attention that may not be decomposed makes the build fail where no kernel fits, and the error does not name it. Alone
it takes a twentieth of a second, and the result holds for all attentions with the same shapes.
"""

from __future__ import annotations

from typing import Any

from ....runtimes.engines.tensorrt.record import Fallback
from .build_log import BuildLog
from .config import make_config
from .logger import make_logger
from .network import Attention, Network, checked
from .profiles import Range, Shapes


def allow_decomposing(
    network: Network, attentions: list[Attention], shapes: list[Shapes], sms: list[str]
) -> list[Fallback]:
    """Let TensorRT decompose the attentions that no kernel fits, and no others. Return these, by profile."""
    fallbacks = []
    reasons: dict[object, str | None] = {}
    for one in attentions:
        found = False
        for profile in shapes:
            key = (profile.name, _signature(one))
            if key not in reasons:
                reasons[key] = _reason(network, one, profile, sms)
            if reason := reasons[key]:
                fallbacks.append(Fallback(one.node, profile.name, reason))
                found = True
        one.layer.attention.decomposable = found
    return fallbacks


def _inputs(one: Attention) -> list[Any]:
    return [one.layer.get_input(index) for index in range(one.layer.num_inputs)]


def _signature(one: Attention) -> object:
    attention = one.layer.attention
    inputs = [(tuple(tensor.shape), tensor.dtype.name) for tensor in _inputs(one)]
    return inputs.__repr__(), str(attention.causal_kind), str(attention.norm_op)


def _reason(network: Network, one: Attention, profile: Shapes, sms: list[str]) -> str | None:
    """Return why no kernel fits, or None if one does."""
    log = BuildLog()
    module = network.library.module
    builder = module.Builder(make_logger(module, log))
    definition = builder.create_network(0)
    inputs = [
        definition.add_input(f"input_{index}", tensor.dtype, tuple(tensor.shape))
        for index, tensor in enumerate(_inputs(one))
    ]
    attention = definition.add_attention_v2(*inputs[:3], one.layer.attention.norm_op, one.layer.attention.causal_kind)
    checked(attention, "attention")
    if len(inputs) > 3:
        attention.mask = inputs[3]
    attention.decomposable = False
    definition.mark_output(attention.get_output(0))
    config = make_config(network.library, builder, sms)
    ranges = builder.create_optimization_profile()
    for tensor in inputs:
        ranges.set_shape(tensor.name, *_sizes(tuple(tensor.shape), profile.batch, profile.tokens))
    config.add_optimization_profile(ranges)
    return None if builder.build_serialized_network(definition, config) is not None else log.first_error


def _sizes(shape: tuple[int, ...], batch: Range, tokens: Range) -> list[tuple[int, ...]]:
    """Return three shapes [B, heads, S, width], in which B and S may be dynamic."""
    sizes = [(size,) * 3 if size != -1 else batch if axis == 0 else tokens for axis, size in enumerate(shape)]
    return [tuple(size[which] for size in sizes) for which in range(3)]
