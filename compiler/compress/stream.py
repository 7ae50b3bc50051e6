"""A program run on many texts at once, op by op: what lies in memory is one layer's weights and what flows there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import LlmcError
from ...ir.program import Program


class Stream:
    """Runs a program without a cache; before each op, who watches may look at what it will read, and change it.

    Args:
        tokens: sequences of one length, [sequences, length].
        batch_tokens: about the number of tokens in a batch.

    Attributes:
        values: for each batch, what is there of the program's values.
        weights: values of the weights in use, by name.
    """

    def __init__(self, program: Program, tokens: Tensor, batch_tokens: int = 2048) -> None:
        self.program = program
        batch = max(1, batch_tokens // tokens.shape[1])
        positions = torch.arange(tokens.shape[1])
        first, second = program.inputs
        self.values: list[dict[fx.Node, Any]] = [
            {first: part, second: positions.expand(len(part), -1).contiguous()} for part in tokens.split(batch)
        ]
        self.weights: dict[str, Tensor] = {}

    def inputs(self, node: fx.Node) -> list[Tensor]:
        """A value in all batches, [tokens, channels] each; all of it finite, and its squares and their sum, too.

        Raises:
            LlmcError: MODEL_NOT_FINITE.
        """
        found: list[Tensor] = [values[node].flatten(0, -2) for values in self.values]
        # No sum of products of these is larger, so nothing that is made of them is infinite.
        if not sum(float(part.float().square().sum()) for part in found) < torch.finfo(torch.float32).max:
            raise LlmcError(
                "MODEL_NOT_FINITE",
                f"On the calibration text what the model computes is NaN, infinite or almost so (at {node.name}).",
                "Check the checkpoint's weights, or round without calibration: --algo rtn.",
            )
        return found

    def replace(self, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Change a value in all batches."""
        for values in self.values:
            values[node] = change(values[node])

    def use(self, name: str, weight: Tensor) -> None:
        """What the ops that come shall read for a weight, whatever the program has there."""
        self.weights[name] = weight

    def run(self, before: Callable[[fx.Node], None], until: fx.Node | None = None) -> None:
        """Run all ops in order; `before` is called with each. The op `until` is the last one it is called with."""
        last = _last_readers(self.program)
        with torch.no_grad():
            for node in self.program.nodes:
                if node.op == "call_function":
                    before(node)
                    if node is until:
                        return
                    self._call(node)
                    self._drop(last.get(node, ()))

    def _call(self, node: fx.Node) -> None:
        assert callable(node.target)
        for values in self.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), partial(self._value, values))
            values[node] = node.target(*args, **kwargs)

    def _value(self, values: dict[fx.Node, Any], node: fx.Node) -> Any:
        if node.op != "get_attr":
            return values[node]
        name = str(node.target)
        if name not in self.weights:
            self.weights[name] = self.program.weights[name].evaluate()
        return self.weights[name]

    def _drop(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            if node.op == "get_attr":
                self.weights.pop(str(node.target), None)
            for values in self.values:
                values.pop(node, None)


def _last_readers(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """For each op the values that nothing reads behind it."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(program.nodes):
        for read in (node, *node.all_input_nodes):
            if read not in seen:
                seen.add(read)
                last.setdefault(node, []).append(read)
    return last
