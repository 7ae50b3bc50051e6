"""Run a program on many sequences op by op, with little memory.

Memory holds the values and weights that the current op and later ops need, about one layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import LlmcError
from ...ir.program import Program


class Stream:
    """A run of a program without a cache that can be observed before each op.

    The observer may look at the values that the op will use, and change them.

    Args:
        tokens: sequences of one length, [sequences, length].
        batch_tokens: about the number of tokens in a batch.

    Attributes:
        values: the program's values that are in memory, for each batch.
        weights: the weights that are in memory, by name.
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
        """Return a value in all batches, each [tokens, channels].

        Raises:
            LlmcError: MODEL_NOT_FINITE if the sum of its squares is not finite in float32.
        """
        batches: list[Tensor] = [values[node].flatten(0, -2) for values in self.values]
        # No sum of products of the values is larger than this sum, so statistics of them are finite too.
        if not sum(float(batch.float().square().sum()) for batch in batches) < torch.finfo(torch.float32).max:
            raise LlmcError(
                "MODEL_NOT_FINITE",
                f"On the calibration text, the values of {node.name} are NaN or too large.",
                "Check the checkpoint's weights, or quantize without calibration: --algo rtn.",
            )
        return batches

    def replace(self, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Change a value in all batches."""
        for values in self.values:
            values[node] = change(values[node])

    def override_weight(self, name: str, weight: Tensor) -> None:
        """Make later ops use this value for a weight instead of the program's."""
        self.weights[name] = weight

    def run(self, before: Callable[[fx.Node], None], until: fx.Node | None = None) -> None:
        """Run all ops in order.

        Args:
            before: called with each op before it runs.
            until: the last op that `before` is called with; this op and later ones do not run.
        """
        last = _last_uses(self.program)
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


def _last_uses(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each op, the values that no later op uses."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(program.nodes):
        for used in (node, *node.all_input_nodes):
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    return last
