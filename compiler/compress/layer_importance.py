"""Importance of layers: how much each layer changes the hidden states.

A layer's importance is one minus the cosine similarity of its input and its output, averaged over the tokens of a text
(Men et al., ShortGPT, 2024: block influence). Dropping the layers of least importance costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...passes.optimize.drop_layers import Layer
from .stream import Stream


def importance(
    program: Program,
    layers: Sequence[Layer],
    tokens: Tensor,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Return each layer's importance: 0 if it only scales hidden states, at most 2.

    Args:
        layers: layers of the program, in order.
        tokens: sequences of one length, [sequences, length].
        watch: called with the number of layers done and the number of all layers.
    """
    stream = Stream(program, tokens)
    order = {node: index for index, node in enumerate(program.nodes)}
    starting = {layer.first: layer for layer in layers}
    # A layer's output is certain to be in memory when it is first used; later it may be dropped.
    ended = {min(layer.after.users, key=order.__getitem__): layer for layer in layers}
    inputs: dict[str, list[Tensor]] = {}
    importances: dict[str, Tensor] = {}

    def before(node: fx.Node) -> None:
        if layer := ended.get(node):
            watch(len(importances), len(layers))
            importances[layer.name] = _change(inputs.pop(layer.name), stream.inputs(layer.after))
        if layer := starting.get(node):
            inputs[layer.name] = stream.inputs(layer.before)

    stream.run(before, until=max(ended, key=order.__getitem__))
    watch(len(layers), len(layers))
    return torch.stack([importances[layer.name] for layer in layers])


def _change(before: list[Tensor], after: list[Tensor]) -> Tensor:
    similarity = torch.cat([torch.cosine_similarity(x, y, dim=1) for x, y in zip(before, after, strict=True)])
    return 1 - similarity.double().mean()
