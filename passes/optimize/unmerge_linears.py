"""Linears that were merged, apart again where a copy of their result costs more than another matmul."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...ir.weights import rows
from ...kernels.ops import quant_linear
from ..base import Rewrite, miss
from ..queries import is_call, is_op

_BY_OUTPUT = ("weight", "scales", "multiples", "zeros", "bias")


class UnmergeLinears(Rewrite):
    """Compute the parts of a merged linear one by one.

    Example:  gate, up = split(quant_linear(x, codes, scales), [I, I], -1)
    Becomes:  gate = quant_linear(x, codes[:I], scales[:I]);  up = quant_linear(x, codes[I:], scales[I:])

    For one token the merged form is the better one. For hundreds the split copies megabytes, and two large matmuls
    are as fast as one. The rows of a stored weight are stored already, so nothing is written twice.

    Left alone: 1. a split along another dim; 2. parts that are read in other ways; 3. something else reads the whole.
    """

    needs = Stage.CACHED

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not is_call(node, "split_with_sizes") or not is_op(node.args[0], quant_linear):
            return None
        whole, sizes, dim = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else 0
        if dim not in (-1, len(whole.meta["val"].shape) - 1):
            return miss("it splits another dim than the outputs", node)
        if len(whole.users) > 1:
            return miss("something else reads the whole", node)
        call = quant_linear.bind(whole.args, dict(whole.kwargs))
        parts = list(_parts(program, call, sizes, node))
        for user in list(node.users):
            program.replace(user, parts[user.args[1]])  # type: ignore[index]
        return True


def _parts(program: Program, call: dict[str, Any], sizes: Any, node: fx.Node) -> Iterator[fx.Node]:
    start = 0
    for size in sizes:
        arguments = dict(call)
        for name in _BY_OUTPUT:
            if isinstance(read := call[name], fx.Node):
                piece = rows(program.weights[str(read.target)], start, start + size)
                arguments[name] = program.add_weight(f"{read.target}.from_{start}", piece, like=node)
        with program.graph.inserting_before(node):
            yield program.call(quant_linear, **arguments, like=node)
        start += size
