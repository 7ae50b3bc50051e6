"""Prune each linear by its inputs, in the order in which a text passes through the model.

The inputs of a linear are computed with the pruned linears before it, so SparseGPT also compensates for their zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...ir.weights import Leaf
from ...kernels.ops import linear
from ...passes.quantize.prune import prunable
from ...passes.queries import arguments, is_op
from .cache import CalibrationCache
from .sparsegpt import sparsegpt
from .sparsity import Sparsity, wanda
from .stream import Stream


@dataclass
class Pruned:
    """Pruned weights of a program.

    Attributes:
        weights: the pruned weights, by the name of the weight that each replaces.
        zeros, numbers: how many zeros and how many numbers all these weights have.
        unpruned: why each of the other linears' weights is not pruned, by its name.
    """

    weights: dict[str, Leaf] = field(default_factory=dict)
    zeros: int = 0
    numbers: int = 0
    unpruned: dict[str, str] = field(default_factory=dict)


def prune(
    program: Program,
    sparsity: Sparsity,
    algorithm: str,
    tokens: Tensor,
    cache: CalibrationCache,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Pruned:
    """Compute pruned weights for the linears of an optimized program, which is not changed.

    Args:
        algorithm: "sparsegpt" or "wanda".
        tokens: texts of one length, [texts, length].
        cache: stores the weights; those that are stored already are not computed again.
        watch: called with the number of linears that are done and the number of all.
    """
    reasons = prunable(program, sparsity.group)
    pruned = Pruned(unpruned={name: why for name, why in reasons.items() if why})
    linears = [node for node in program.nodes if is_op(node, linear) and reasons.get(_weight_name(node)) == ""]
    if not linears:
        return pruned
    stream, done = Stream(program, tokens), 0
    inputs = _Inputs(stream)

    def before(node: fx.Node) -> None:
        nonlocal done
        if node not in linears:
            return
        watch(done, len(linears))
        done += 1
        name, value = _weight_name(node), arguments(node)["x"]
        if name in pruned.weights:
            return  # several linears share this weight; it is pruned by the inputs of the first
        parts = cache.keep(f"{name} pruned", lambda: _prune_weight(program, name, value, inputs, sparsity, algorithm))
        pruned.weights[name] = parts["weight"]
        pruned.zeros += int(parts["zeros"].evaluate())
        pruned.numbers += parts["weight"].numel
        stream.override_weight(name, parts["weight"].evaluate())

    stream.run(before, until=linears[-1])
    watch(done, len(linears))
    return pruned


def _weight_name(node: fx.Node) -> str:
    return str(getattr(node.args[1], "target", ""))


def _prune_weight(
    program: Program, name: str, value: fx.Node, inputs: _Inputs, sparsity: Sparsity, algorithm: str
) -> dict[str, Tensor]:
    """Return a pruned weight, and the number of its zeros."""
    stored = program.weights[name].evaluate()
    if algorithm == "wanda":
        weight = wanda(stored.float(), inputs.squared_norms(value), sparsity)
    else:
        weight = sparsegpt(stored.float(), inputs.gram_matrix(value), sparsity)
    weight = weight.to(stored.dtype)
    return {"weight": weight, "zeros": (weight == 0).sum()}


class _Inputs:
    """Statistics of the values that linears read."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._last: tuple[fx.Node, Tensor] | None = None

    def gram_matrix(self, value: fx.Node) -> Tensor:
        """X'X of a value. The last result is kept, since several linears may read the value."""
        if self._last is None or self._last[0] is not value:
            self._last = value, torch.stack([batch.T @ batch for batch in self.stream.inputs(value)]).sum(0)
        return self._last[1]

    def squared_norms(self, value: fx.Node) -> Tensor:
        """The sum of squares of each channel, the diagonal of X'X."""
        return torch.stack([batch.square().sum(0) for batch in self.stream.inputs(value)]).sum(0)
