"""Merge several projections of one value into one matmul."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ...ir.program import Miss, Program
from ...ir.weights import concat
from ...kernels.ops import linear, rms_norm, rope
from ..base import miss
from ..queries import arguments, is_call, is_op

aten = torch.ops.aten

_RESHAPES = ("view", "reshape", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "contiguous", "clone")


def projection_behind(node: object) -> fx.Node | None:
    """Return the linear that `node` comes from, or None.

    Looks through reshapes, norms of heads and rope.
    """
    while isinstance(node, fx.Node):
        if is_op(node, linear):
            return node
        if not (is_call(node, *_RESHAPES) or is_op(node, rope) or is_op(node, rms_norm)):
            return None
        node = node.args[0]
    return None


def merge(program: Program, projections: Sequence[fx.Node], name: str) -> Miss | bool:
    """Replace linears with the same input by one linear and a split of its output.

    Args:
        projections: the linears, in the order of their outputs in the merged one.
        name: the merged module's name, such as "qkv_proj". In weight names it replaces the first linear's own name.
    """
    calls = [arguments(node) for node in projections]
    first = projections[0]
    if any(call["x"] is not calls[0]["x"] for call in calls):
        return miss("the projections have different inputs", first)
    weights = [program.weight_of(call["weight"]) for call in calls]
    biases = [program.weight_of(call["bias"]) for call in calls]
    if any(weight is None for weight in weights):
        return miss("a projection's weight is computed", first)
    if any(call["bias"] is not None and bias is None for call, bias in zip(calls, biases, strict=True)):
        return miss("a projection's bias is computed", first)
    if any(len(call["weight"].users) > 1 for call in calls):
        return miss("a projection's weight is used elsewhere too", first)
    if len({bias is None for bias in biases}) > 1:
        return miss("some projections have a bias and some have none", first)

    stem = ".".join([*str(calls[0]["weight"].target).split(".")[:-2], name])
    anchor = min(projections, key=program.nodes.index)
    with program.graph.inserting_before(anchor):
        weight = program.add_weight(f"{stem}.weight", concat([w for w in weights if w], 0), like=first)
        bias = None
        if biases[0] is not None:
            bias = program.add_weight(f"{stem}.bias", concat([b for b in biases if b], 0), like=first)
        merged = program.call(linear, calls[0]["x"], weight, bias, like=first)
        sizes = [w.shape[0] for w in weights if w]
        parts = program.call(aten.split_with_sizes.default, merged, sizes, -1, like=first)
        outputs = [program.item(parts, i) for i in range(len(sizes))]
    for old, new in zip(projections, outputs, strict=True):
        program.replace(old, new)
    return True
