"""How much each layer does to what flows through the model: those that do least are missed least.

A layer's importance is one minus the cosine of what flows into it and what comes out, token by token, in the mean over
a text (Men et al., ShortGPT, 2024: block influence).
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
    """Of each layer, 0 if it only makes what flows longer or shorter, 2 at most.

    Args:
        layers: of this program, in order.
        tokens: texts of one length, [texts, length].
        watch: called with the layers that are done and all of them.
    """
    stream = Stream(program, tokens)
    order = {node: place for place, node in enumerate(program.nodes)}
    begins = {layer.first: layer for layer in layers}
    # What comes out of a layer is there when it is first read, and may not be later.
    ends = {min(layer.after.users, key=order.__getitem__): layer for layer in layers}
    given: dict[str, list[Tensor]] = {}
    found: dict[str, Tensor] = {}

    def before(node: fx.Node) -> None:
        if layer := ends.get(node):
            watch(len(found), len(layers))
            found[layer.name] = _change(given.pop(layer.name), stream.inputs(layer.after))
        if layer := begins.get(node):
            given[layer.name] = stream.inputs(layer.before)

    stream.run(before, until=max(ends, key=order.__getitem__))
    watch(len(layers), len(layers))
    return torch.stack([found[layer.name] for layer in layers])


def _change(before: list[Tensor], after: list[Tensor]) -> Tensor:
    alike = torch.cat([torch.cosine_similarity(x, y, dim=1) for x, y in zip(before, after, strict=True)])
    return 1 - alike.double().mean()
