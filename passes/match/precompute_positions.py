"""Replace computations on positions by lookups in precomputed tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...ir.weights import constant
from ...kernels.ops import embedding
from ..base import Fuel, Pass, PassResult, miss
from ..queries import is_call, is_op, shape
from .partial import Evaluator, depends_on_positions

aten = torch.ops.aten

# These stay after the lookup, so that layers with different views of the same values share one table.
_VIEWS = frozenset(
    "unsqueeze squeeze expand view reshape unflatten transpose permute to _to_copy contiguous clone "
    "view_as_complex".split()
)


class PrecomputePositions(Pass):
    """Replace a computation on positions by a lookup in a table.

    The table has one entry for each of `max_seq_len` positions.
    Example:  cos = cat([f, f]).cos() * scale, where f = positions[:, :, None] * inv_freq
    Becomes:  cos = embedding(positions, table)

    Scaled rotary frequencies and added sinusoidal embeddings thus become one lookup each.

    Left alone: 1. integers, which are indices into a learned table; 2. a value that depends on other positions than
    its own; 3. a value without exactly one dim each for batch and position, or with another dynamic dim.
    """

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        positional = depends_on_positions(program)
        matches, misses = 0, []
        tables: dict[Any, fx.Node] = {}
        for node in program.nodes:
            if fuel.empty or node not in positional or not self._is_frontier(node, positional):
                continue
            outcome = self._tabulate(program, node, tables)
            if isinstance(outcome, Miss):
                misses.append(outcome)
            else:
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)

    @staticmethod
    def _is_frontier(node: fx.Node, positional: set[fx.Node]) -> bool:
        """True if a token-dependent call reads this value, directly or through views."""
        value = value_of(node)
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return False
        if is_call(node, *_VIEWS) or is_op(node, embedding):
            return False
        seen, queue = set(), list(node.users)
        while queue:
            user = queue.pop()
            if user not in positional:
                return True
            if user not in seen and is_call(user, *_VIEWS):
                seen.add(user)
                queue += user.users
        return False

    def _tabulate(self, program: Program, node: fx.Node, tables: dict[Any, fx.Node]) -> bool | Miss:
        batch_size, length = (str(size) for size in shape(program.positions))
        dims = [str(size) for size in shape(node)]
        if dims.count(batch_size) != 1 or dims.count(length) != 1:
            return miss("it does not have exactly one dim each for batch and position", node)
        batch, sequence = dims.index(batch_size), dims.index(length)
        rest = [i for i in range(len(dims)) if i not in (batch, sequence)]
        if any(isinstance(shape(node)[i], torch.SymInt) for i in rest):
            return miss("a dim other than batch and position is dynamic", node)

        def values(positions: Tensor) -> Tensor:  # [B, S, K]
            value = Evaluator(program, positions)(node).permute(batch, sequence, *rest)
            return _as_real(value).reshape(*positions.shape, -1)

        table = values(torch.arange(program.max_seq_len)[None])[0].contiguous()
        if not all(torch.allclose(values(some), table[some], rtol=1e-5, atol=1e-6) for some in _samples(program)):
            return miss("its value at one position depends on other positions", node)

        content = table.dtype, table.view(torch.uint8).numpy().tobytes()
        with program.graph.inserting_before(node):
            if content not in tables:
                weight = program.add_weight(f"tables.{node.name}", constant(table, f"tables.{node.name}"), like=node)
                tables[content] = program.call(embedding, program.positions, weight, like=node)
            new = _shaped(program, tables[content], node, [batch, sequence, *rest])
        program.replace(node, new)
        return True


def _samples(program: Program) -> Iterator[Tensor]:
    """Positions [B, S] to check a table at.

    One sequence from position 0 for each power of two below `max_seq_len`, and two sequences of random positions.
    """
    longest = program.max_seq_len
    length = 1
    while length < longest:
        yield torch.arange(length)[None]
        length *= 2
    yield torch.randint(0, longest, (2, 7), generator=torch.Generator().manual_seed(0))


def _shaped(program: Program, entries: fx.Node, like: fx.Node, order: list[int]) -> fx.Node:
    """Bring looked-up table entries [B, S, K] to the shape of `like`.

    Args:
        order: for each dim of the entries, with K split into several, the dim of `like` that it is.
    """
    value = value_of(like)
    sizes = [value.shape[i] for i in order[2:]] + [2] * value.is_complex()
    if len(sizes) != 1:
        entries = program.call(aten.unflatten.int, entries, 2, sizes or [1], like=like)
    if not sizes:
        entries = program.call(aten.squeeze.dim, entries, 2, like=like)
    if value.is_complex():
        entries = program.call(aten.view_as_complex.default, entries, like=like)
    if order != sorted(order):
        entries = program.call(aten.permute.default, entries, [order.index(i) for i in range(len(order))], like=like)
    return entries


def _as_real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value
