"""Pruning each linear by what flows into it, in the order in which a text flows through the model.

What a linear reads has passed the pruned linears before it, so SparseGPT makes good what it can of their zeros too.
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
from .cache import Shelf
from .channel_scales import Inputs
from .sparsegpt import sparsegpt
from .sparsity import Sparsity, wanda
from .stream import Stream

# The first is the default.
PRUNE_ALGOS = ("sparsegpt", "wanda")


@dataclass
class Pruned:
    """What pruning found.

    Attributes:
        weights: with zeros, by the name of what they replace.
        errors: of each linear's output, relative to its size, by the name of its weight.
        zeros, numbers: how many in all these weights.
        whole: the other linears' weights by name, and why each stays.
    """

    weights: dict[str, Leaf] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    zeros: int = 0
    numbers: int = 0
    whole: dict[str, str] = field(default_factory=dict)


def prune(
    program: Program,
    sparsity: Sparsity,
    algorithm: str,
    tokens: Tensor,
    shelf: Shelf,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Pruned:
    """Find pruned weights for the linears of an optimized program, which is left as it was.

    Args:
        algorithm: "sparsegpt" or "wanda".
        tokens: texts of one length, [texts, length].
        shelf: where the weights lie; what is there already is not computed again.
        watch: called with the linears that are done and all of them.
    """
    reasons = prunable(program, sparsity.group)
    found = Pruned(whole={name: why for name, why in reasons.items() if why})
    linears = [node for node in program.nodes if is_op(node, linear) and reasons.get(_name(node)) == ""]
    if not linears:
        return found
    stream, done = Stream(program, tokens), 0
    squares = _Squares(stream)

    def before(node: fx.Node) -> None:
        nonlocal done
        if node not in linears:
            return
        watch(done, len(linears))
        done += 1
        name, value = _name(node), arguments(node)["x"]
        if name in found.weights:
            return  # several linears read it, and the first has decided
        parts = shelf.keep(f"{name} pruned", lambda: _pruned(program, name, value, squares, sparsity, algorithm))
        found.weights[name] = parts["weight"]
        found.errors[name] = float(parts["error"].evaluate())
        found.zeros += int(parts["zeros"].evaluate())
        found.numbers += parts["weight"].numel
        stream.use(name, parts["weight"].evaluate())

    stream.run(before, until=linears[-1])
    watch(done, len(linears))
    return found


def _name(node: fx.Node) -> str:
    return str(getattr(node.args[1], "target", ""))


def _pruned(
    program: Program, name: str, value: fx.Node, squares: _Squares, sparsity: Sparsity, algorithm: str
) -> dict[str, Tensor]:
    """A weight with zeros, how many, and the error of its linear."""
    stored = program.weights[name].evaluate()
    weight = stored.float()
    if algorithm == "wanda":
        made = wanda(weight, squares.by_channel(value), sparsity)
    else:
        made = sparsegpt(weight, squares.of(value), sparsity)
    made = made.to(stored.dtype)
    sample = Inputs.of(squares.stream.inputs(value)).sample.float()
    error = (sample @ (made.float() - weight).T).square().sum() / (sample @ weight.T).square().sum()
    return {"weight": made, "error": error, "zeros": (made == 0).sum()}


class _Squares:
    """X'X of a value, which several linears may read, or its diagonal."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._last: tuple[fx.Node, Tensor] | None = None

    def of(self, value: fx.Node) -> Tensor:
        if self._last is None or self._last[0] is not value:
            self._last = value, torch.stack([batch.T @ batch for batch in self.stream.inputs(value)]).sum(0)
        return self._last[1]

    def by_channel(self, value: fx.Node) -> Tensor:
        return torch.stack([batch.square().sum(0) for batch in self.stream.inputs(value)]).sum(0)
