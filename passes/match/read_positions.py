"""What a model counts by itself follows from the program's positions, so that a cache can shift it."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Miss, Program
from ...ir.weights import Call, Weight, constant
from ...kernels.ops import embedding
from ..base import Fuel, Pass, PassResult, miss
from ..queries import is_call, shape
from .partial import Evaluator

aten = torch.ops.aten

# Their result has the dims of their operands, counted from the last one.
_BROADCASTING = (
    "add sub rsub mul div pow where masked_fill maximum minimum remainder floor_divide atan2 eq ne lt le gt ge "
    "logical_and logical_or logical_xor"
).split()


class ReadPositions(Pass):
    """Look up by position what has a row for each position of a sequence that is taken to begin at 0.

    Example:  p = embedding(weight, arange(S) + 2)      # [S, H]
              y = add(h, p)                             # h and y: [B, S, H]
    Becomes:  p = embedding(positions, rows)            # [B, S, H]
              y = add(h, p),  with the weight rows = embedding(weight, arange(max_seq_len) + 2)

    A candidate follows from weights and the length alone and meets what follows from tokens. That it counts
    positions is seen by its values: at every length its rows are the first of the same rows.

    Left alone: 1. what is the same at every position: token types, masks of ones; 2. a value with another number of
    dims for positions than one, such as a mask from each to each; 3. one whose rows depend on the length; 4. one that
    is complex or has no value at some position below `max_seq_len`; 5. a reader that can't tell where the rows' dim
    for the batch belongs.
    """

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        lookups: dict[Any, fx.Node] = {}
        counted = _counted(program)
        for node in program.nodes:
            if fuel.empty or node not in counted or not isinstance(node.meta["val"], Tensor):
                continue
            readers = [user for user in node.users if user.op == "call_function" and user not in counted]
            if not readers:
                continue
            table = _rows_by_position(program, node)
            if table is None:
                continue
            if isinstance(table, Miss):
                misses.append(table)
                continue
            blind = _replace(program, node, readers, table, lookups)
            misses += [miss("a reader can't tell which dim is the batch's", reader) for reader in blind]
            if len(blind) < len(readers):
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)


def _counted(program: Program) -> set[fx.Node]:
    """The calls that follow from sizes and weights alone, and the sizes themselves."""
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


def _rows_by_position(program: Program, node: fx.Node) -> Tensor | Miss | None:
    """The rows that it has for all positions, [max_seq_len, K]; None where it counts nothing."""
    batch, length = (str(size) for size in shape(program.inputs[1]))
    dims = [str(size) for size in shape(node)]
    if not any(re.search(rf"\b{length}\b", dim) for dim in dims):
        return None if _is_steady(program, node) else miss("it depends on the length of the sequence", node)
    if dims.count(length) != 1 or dims.count(batch) > 1:
        return miss("it has another number of dims for positions than one", node)
    if any(isinstance(size, torch.SymInt) and str(size) not in (batch, length) for size in shape(node)):
        return miss("a dim besides batch and sequence is not static", node)
    if node.meta["val"].is_complex():
        return miss("it is complex, and a table holds real numbers", node)
    try:
        table = _rows(program, node, 1, program.max_seq_len)[0]
    except (IndexError, RuntimeError):
        return miss(f"it has no value at some position below {program.max_seq_len}", node)
    if torch.equal(table, table[:1].expand_as(table)):
        return None
    for rows in (_rows(program, node, *sizes) for sizes in _samples(program)):
        if not all(torch.allclose(row.double(), table[: len(row)].double(), rtol=1e-5, atol=1e-6) for row in rows):
            return miss("what it is at one position depends on the length of the sequence", node)
    return table


def _replace(
    program: Program, node: fx.Node, readers: list[fx.Node], table: Tensor, lookups: dict[Any, fx.Node]
) -> list[fx.Node]:
    """Let readers look rows up; those that could not are returned."""
    batch, length = (str(size) for size in shape(program.inputs[1]))
    dims = [str(size) for size in shape(node)]
    blind: list[fx.Node] = []
    for reader in readers:
        place = dims.index(batch) - len(dims) if batch in dims else _place_of_batch(reader, dims, batch, length)
        if place is None:
            blind.append(reader)
            continue
        with program.graph.inserting_before(node):
            new = _shaped(program, _look_up(program, node, table, lookups), node, place)
        reader.replace_input_with(node, new)
    return blind


def _is_steady(program: Program, node: fx.Node) -> bool:
    """Whether a value without a dim for positions is the same at every length."""
    short, long = (Evaluator(program, torch.zeros(1, n, dtype=torch.int64))(node) for n in (2, 5))
    return bool(torch.equal(short, long))


def _samples(program: Program) -> Iterator[tuple[int, int]]:
    """Rows and lengths: one row of every length that is a power of two, and two rows."""
    size = 1
    while size < program.max_seq_len:
        yield 1, size
        size *= 2
    yield 2, min(3, program.max_seq_len)


def _rows(program: Program, node: fx.Node, batch: int, length: int) -> Tensor:
    """Its values for sequences of a length, [B, S, K]; B is 1 where the node has no dim for it."""
    value = Evaluator(program, torch.zeros(batch, length, dtype=torch.int64))(node)
    return value.permute(_order(program, node)).reshape(-1 if _has_batch(program, node) else 1, length, _width(node))


def _has_batch(program: Program, node: fx.Node) -> bool:
    return str(shape(program.inputs[1])[0]) in map(str, shape(node))


def _order(program: Program, node: fx.Node) -> list[int]:
    """Its dims with the batch's first, if it has one, and that of positions next."""
    symbols = [str(size) for size in shape(program.inputs[1])]
    dims = [str(size) for size in shape(node)]
    front = [dims.index(symbol) for symbol in symbols if symbol in dims]
    return [*front, *(i for i in range(len(dims)) if i not in front)]


def _width(node: fx.Node) -> int:
    width = 1
    for size in shape(node):
        width *= size if isinstance(size, int) else 1
    return width


def _place_of_batch(reader: fx.Node, dims: list[str], batch: str, length: str) -> int | None:
    """Where the batch's dim of the reader's result is, counted from the last one."""
    if not is_call(reader, *_BROADCASTING):
        return None
    out = [str(size) for size in shape(reader)]
    if out.count(batch) != 1 or out.count(length) != 1:
        return None
    place = out.index(batch) - len(out)
    if out.index(length) - len(out) != dims.index(length) - len(dims):
        return None
    return place if -place > len(dims) or dims[place] == "1" else None


def _look_up(program: Program, node: fx.Node, table: Tensor, lookups: dict[Any, fx.Node]) -> fx.Node:
    content = table.dtype, table.contiguous().view(torch.uint8).numpy().tobytes()
    if content not in lookups:
        name = f"tables.{node.name}"
        weight = _expression(program, node)
        # What is trained stays an expression; what the architecture says is kept as computed.
        if weight.is_constant:
            weight = constant(table.contiguous(), name)
        lookups[content] = program.call(
            embedding, program.inputs[1], program.add_weight(name, weight, like=node), like=node
        )
    return lookups[content]


def _expression(program: Program, node: fx.Node) -> Weight:
    """The rows for all positions, [max_seq_len, K], as an expression over weights."""
    sizes = Evaluator(program, torch.zeros(1, program.max_seq_len, dtype=torch.int64))
    made: dict[fx.Node, Any] = {}

    def value(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [value(x) for x in argument]
        return of(argument) if isinstance(argument, fx.Node) else argument

    def of(source: fx.Node) -> Any:
        if source not in made:
            if weight := program.weight_of(source):
                made[source] = weight
            elif not isinstance(source.meta["val"], Tensor):
                made[source] = sizes(source)
            else:
                call: Any = source
                output: Any = None
                if source.target is operator.getitem:
                    call, output = source.args
                arguments = tuple(value(x) for x in call.args), {k: value(x) for k, x in call.kwargs.items()}
                made[source] = Call(call.target, *arguments, output)
        return made[source]

    turned = Call(aten.permute.default, (of(node), _order(program, node)))
    return Call(aten.reshape.default, (turned, [program.max_seq_len, _width(node)]))


def _shaped(program: Program, row: fx.Node, like: fx.Node, place: int) -> fx.Node:
    """Bring looked-up rows [B, S, K] to the dims of `like`, with the batch's at `place` from the last one."""
    dims: list[Any] = [1] * max(-place - len(shape(like)), 0) + list(shape(like))
    dims[place] = "batch"
    rest = [size for size in dims if isinstance(size, int) and size != 1]
    if len(rest) != 1:
        row = program.call(aten.unflatten.int, row, 2, rest, like=like) if rest else _squeezed(program, row, like)
    wide = [i for i, size in enumerate(dims) if size != 1]
    held = [place % len(dims), *(i for i in wide if isinstance(dims[i], torch.SymInt))]
    held += [i for i in wide if i not in held]
    if held != wide:
        row = program.call(aten.permute.default, row, [held.index(i) for i in wide], like=like)
    for i, size in enumerate(dims):
        if isinstance(size, int) and size == 1:
            row = program.call(aten.unsqueeze.default, row, i, like=like)
    return row


def _squeezed(program: Program, row: fx.Node, like: fx.Node) -> fx.Node:
    return program.call(aten.squeeze.dim, row, 2, like=like)
