"""Replace positions that a model counts by itself by the program's positions."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...ir.weights import Call, Weight, constant
from ...kernels.ops import embedding
from ..base import Fuel, Pass, PassResult, miss
from ..queries import is_call, shape
from .partial import Evaluator

aten = torch.ops.aten

# Broadcasting ops: the dims of the operands and of the result are aligned at the last one.
_BROADCASTING = (
    "add sub rsub mul div pow where masked_fill maximum minimum remainder floor_divide atan2 eq ne lt le gt ge "
    "logical_and logical_or logical_xor"
).split()


class ReadPositions(Pass):
    """Replace values for positions that a model counts from 0 by lookups.
    With a KV cache a sequence may continue at any position, so the model must not count tokens by itself.

    Example:  p = embedding(weight, arange(S) + 2)      # [S, H]
              y = add(h, p)                             # h and y: [B, S, H]
    Becomes:  p = embedding(positions, table)           # [B, S, H]
              y = add(h, p),  with the weight table = embedding(weight, arange(max_seq_len) + 2)

    A candidate depends on weights and the length alone and has a token-dependent user. The pass compares its values at
    several lengths: it counts positions if they are always the first entries of one table.

    Left alone: 1. a value that is the same at every position, such as token types or a mask of ones; 2. a value without
    exactly one dim for positions, such as a [S, S] mask; 3. a value at a position that depends on the length; 4. a
    value that is complex or that does not exist at some position below `max_seq_len`; 5. a user for which the batch dim
    of the looked-up value is not known.
    """

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        lookups: dict[Any, fx.Node] = {}
        counted = _counted(program)
        for node in program.nodes:
            if fuel.empty or node not in counted or not isinstance(value_of(node), Tensor):
                continue
            users = [user for user in node.users if user.op == "call_function" and user not in counted]
            if not users:
                continue
            table = _table_by_position(program, node)
            if table is None:
                continue
            if isinstance(table, Miss):
                misses.append(table)
                continue
            left = _replace(program, node, users, table, lookups)
            misses += [miss("the batch dim of a position-dependent operand is not known", user) for user in left]
            if len(left) < len(users):
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)


def _counted(program: Program) -> set[fx.Node]:
    """The calls that depend on sizes and weights alone, including the sizes."""
    known: set[fx.Node] = set(program.graph.find_nodes(op="get_attr"))
    for node in program.nodes:
        if node.op == "call_function" and (
            node.target is aten.sym_size.int
            or (not _is_random(node) and all(source in known for source in node.all_input_nodes))
        ):
            known.add(node)
    return {node for node in known if node.op == "call_function"}


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _table_by_position(program: Program, node: fx.Node) -> Tensor | Miss | None:
    """The values of `node` at all positions, [max_seq_len, K].

    Returns None if the values do not depend on the position.
    """
    batch, length = (str(size) for size in shape(program.positions))
    dims = [str(size) for size in shape(node)]
    if not any(re.search(rf"\b{length}\b", dim) for dim in dims):
        return (
            None
            if _is_constant(program, node)
            else miss("it depends on the length of the sequence but has no dim for positions", node)
        )
    if dims.count(length) != 1 or dims.count(batch) > 1:
        return miss("it does not have exactly one dim for positions", node)
    if any(isinstance(size, torch.SymInt) and str(size) not in (batch, length) for size in shape(node)):
        return miss("a dim other than batch and position is dynamic", node)
    if value_of(node).is_complex():
        return miss("it is complex, and a table can hold real numbers only", node)
    try:
        table = _values(program, node, 1, program.max_seq_len)[0]
    except (IndexError, RuntimeError):
        return miss(f"it cannot be evaluated for every position below {program.max_seq_len}", node)
    if torch.equal(table, table[:1].expand_as(table)):
        return None
    for values in (_values(program, node, *sizes) for sizes in _samples(program)):
        if not all(torch.allclose(one.double(), table[: len(one)].double(), rtol=1e-5, atol=1e-6) for one in values):
            return miss("its value at one position depends on the length of the sequence", node)
    return table


def _replace(
    program: Program, node: fx.Node, users: list[fx.Node], table: Tensor, lookups: dict[Any, fx.Node]
) -> list[fx.Node]:
    """Let the users of `node` read a lookup instead.

    Returns the users for which this is not possible.
    """
    batch, length = (str(size) for size in shape(program.positions))
    dims = [str(size) for size in shape(node)]
    left: list[fx.Node] = []
    for user in users:
        batch_dim = dims.index(batch) - len(dims) if batch in dims else _batch_dim(user, dims, batch, length)
        if batch_dim is None:
            left.append(user)
            continue
        with program.graph.inserting_before(node):
            new = _shaped(program, _look_up(program, node, table, lookups), node, batch_dim)
        user.replace_input_with(node, new)
    return left


def _is_constant(program: Program, node: fx.Node) -> bool:
    """True if a value without a dim for positions is the same at two lengths."""
    short, long = (Evaluator(program, torch.zeros(1, n, dtype=torch.int64))(node) for n in (2, 5))
    return bool(torch.equal(short, long))


def _samples(program: Program) -> Iterator[tuple[int, int]]:
    """The (batch, length) pairs to check a table at.

    One sequence for each power of two below `max_seq_len`, and one batch of two sequences.
    """
    size = 1
    while size < program.max_seq_len:
        yield 1, size
        size *= 2
    yield 2, min(3, program.max_seq_len)


def _values(program: Program, node: fx.Node, batch: int, length: int) -> Tensor:
    """The values of `node` at one size, [B, S, K]; B is 1 without a batch dim."""
    value = Evaluator(program, torch.zeros(batch, length, dtype=torch.int64))(node)
    return value.permute(_order(program, node)).reshape(-1 if _has_batch(program, node) else 1, length, _width(node))


def _has_batch(program: Program, node: fx.Node) -> bool:
    return str(shape(program.positions)[0]) in map(str, shape(node))


def _order(program: Program, node: fx.Node) -> list[int]:
    """The dims of `node`, reordered: the batch if any, positions, the rest."""
    symbols = [str(size) for size in shape(program.positions)]
    dims = [str(size) for size in shape(node)]
    front = [dims.index(symbol) for symbol in symbols if symbol in dims]
    return [*front, *(i for i in range(len(dims)) if i not in front)]


def _width(node: fx.Node) -> int:
    width = 1
    for size in shape(node):
        width *= size if isinstance(size, int) else 1
    return width


def _batch_dim(user: fx.Node, dims: list[str], batch: str, length: str) -> int | None:
    """The batch dim that an operand of `user` must have, counted from the end.

    Returns None if it is not known.

    Args:
        dims: sizes of the operand as it is, without a batch dim.
    """
    if not is_call(user, *_BROADCASTING):
        return None
    out = [str(size) for size in shape(user)]
    if out.count(batch) != 1 or out.count(length) != 1:
        return None
    batch_dim = out.index(batch) - len(out)
    if out.index(length) - len(out) != dims.index(length) - len(dims):
        return None
    return batch_dim if -batch_dim > len(dims) or dims[batch_dim] == "1" else None


def _look_up(program: Program, node: fx.Node, table: Tensor, lookups: dict[Any, fx.Node]) -> fx.Node:
    content = table.dtype, table.contiguous().view(torch.uint8).numpy().tobytes()
    if content not in lookups:
        name = f"tables.{node.name}"
        weight = _expression(program, node)
        # Trained values stay an expression. Values that follow from the architecture are stored as computed.
        if weight.is_constant:
            weight = constant(table.contiguous(), name)
        lookups[content] = program.call(
            embedding, program.positions, program.add_weight(name, weight, like=node), like=node
        )
    return lookups[content]


def _expression(program: Program, node: fx.Node) -> Weight:
    """The values of `node` at all positions as an expression, [max_seq_len, K]."""
    sizes = Evaluator(program, torch.zeros(1, program.max_seq_len, dtype=torch.int64))
    converted: dict[fx.Node, Any] = {}

    def value(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [value(x) for x in argument]
        return convert(argument) if isinstance(argument, fx.Node) else argument

    def convert(source: fx.Node) -> Any:
        if source not in converted:
            if weight := program.weight_of(source):
                converted[source] = weight
            elif not isinstance(value_of(source), Tensor):
                converted[source] = sizes(source)
            else:
                call: Any = source
                output: Any = None
                if source.target is operator.getitem:
                    call, output = source.args
                arguments = tuple(value(x) for x in call.args), {k: value(x) for k, x in call.kwargs.items()}
                converted[source] = Call(call.target, *arguments, output)
        return converted[source]

    permuted = Call(aten.permute.default, (convert(node), _order(program, node)))
    return Call(aten.reshape.default, (permuted, [program.max_seq_len, _width(node)]))


def _shaped(program: Program, entries: fx.Node, like: fx.Node, batch_dim: int) -> fx.Node:
    """Bring looked-up table entries [B, S, K] to the dims of `like` and a batch dim.

    Args:
        batch_dim: the place of the batch dim, counted from the end.
    """
    dims: list[Any] = [1] * max(-batch_dim - len(shape(like)), 0) + list(shape(like))
    dims[batch_dim] = "batch"
    rest = [size for size in dims if isinstance(size, int) and size != 1]
    if len(rest) != 1:
        entries = _split(program, entries, rest, like)
    wide = [i for i, size in enumerate(dims) if size != 1]
    held = [batch_dim % len(dims), *(i for i in wide if isinstance(dims[i], torch.SymInt))]
    held += [i for i in wide if i not in held]
    if held != wide:
        entries = program.call(aten.permute.default, entries, [held.index(i) for i in wide], like=like)
    for i, size in enumerate(dims):
        if isinstance(size, int) and size == 1:
            entries = program.call(aten.unsqueeze.default, entries, i, like=like)
    return entries


def _split(program: Program, entries: fx.Node, sizes: list[int], like: fx.Node) -> fx.Node:
    """Split the last dim of [B, S, K] into `sizes`; remove it if there are none."""
    if sizes:
        return program.call(aten.unflatten.int, entries, 2, sizes, like=like)
    return program.call(aten.squeeze.dim, entries, 2, like=like)
