"""Recognize rotary embeddings by what they compute, not by how they are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...ir.nodes import value_of
from ...ir.program import Program, op_name
from ...ir.weights import constant
from ...kernels.ops import embedding, rope
from ..base import Fuel, Pass, PassResult, miss
from ..queries import dtype, is_call, is_op
from .partial import Evaluator
from .precompute_positions import PrecomputePositions
from .rope_regions import Regions, sizes

aten = torch.ops.aten


class MatchRope(Pass):
    """Replace rotations of pairs of dims by position-dependent angles by one op.

    Example:  c = embedding(positions, cos);  s = embedding(positions, sin)
              y = x * c[:, None] + cat([-x[..., d:], x[..., :d]], -1) * s[:, None]
    Becomes:  y = rope(x, positions, cos[:, :d], sin[:, :d])

    Every spelling (pairs from two halves or of neighbours, complex numbers, only some of the dims) is a linear map of x
    whose factors come from tables. The pass evaluates the map on probes. The results show which dims are not rotated,
    which dims form pairs and which table columns are the cosines and sines. The op must then reproduce the map on
    random numbers at random positions.

    Left alone: 1. a map that is no such rotation; 2. factors that are no columns of a table; 3. a product of two
    values of which neither is a table; 4. several values mixed together.
    """

    after = (PrecomputePositions,)

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        regions = Regions(program)
        rotations: dict[str, _Rotation | None] = {}
        tables = _TableWeights(program)
        covered: set[fx.Node] = set()
        matches = 0
        for end in reversed(regions.mixed):  # the largest region around a rotation ends last
            if fuel.empty or end in covered or not isinstance(value_of(end), Tensor):
                continue
            for start in regions.starts(end):
                region = regions.between(start, end)
                lookups = regions.lookups(region)
                signature = _signature(program, start, region + lookups)
                if signature not in rotations:
                    rotations[signature] = _probe(program, start, end, lookups)
                if rotation := rotations[signature]:
                    _rewrite(program, start, end, rotation, tables)
                    covered.update(region)
                    matches += 1
                    fuel.burn()
                    break
        misses = [
            miss("the values that this table multiplies are not rotated in pairs", node)
            for node in regions.mixed
            if op_name(node) == "aten.mul" and node not in covered and not fuel.empty
        ]
        return PassResult(matches, misses)


@dataclass(frozen=True)
class _Rotation:
    """The arguments of the op that replaces a region.

    Attributes:
        cos, sin: tables [M, R/2], for M positions and R rotated dims.
        interleaved: a pair is two neighbouring dims; otherwise it has one dim in each half.
        regroup: the result has the other layout of pairs.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    regroup: bool


def _probe(program: Program, start: fx.Node, end: fx.Node, lookups: list[fx.Node]) -> _Rotation | None:
    """The rotation of the last dim by which `end` is computed from `start`, or None."""
    batch, length = sizes(program.positions)
    dims = sizes(start)
    value = value_of(start)
    if not value.is_floating_point() or len(dims) not in (3, 4) or dims[0] != batch or dims[1:-1].count(length) != 1:
        return None
    if not all(d.isdecimal() for d in dims if d not in (batch, length)):
        return None
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, program.max_seq_len, (2, 64), generator=generator)
    sample = torch.randn([{batch: 2, length: 64}.get(d) or int(d) for d in dims], generator=generator)

    def rotate(x: Tensor) -> Tensor:
        return _heads_first(_Wide(program, positions, {start: x})(end).float(), dims, length)

    x, y = _heads_first(sample, dims, length), rotate(sample)  # [B, H, S, D]
    changed = (y != x).flatten(0, 2).any(0).nonzero()
    if not len(changed):
        return None
    columns = _Columns(program, lookups, positions)
    width = x.shape[-1]
    for rotated in sorted({int(changed.max()) // 2 * 2 + 2, width // 2 * 2}):
        for interleaved, regroup in ((False, False), (True, False), (True, True), (False, True)):
            if regroup and rotated != width:
                continue
            # The image of (1, 0) in each pair is (cos, sin).
            unit = torch.zeros_like(sample)
            unit[..., _first_of_pairs(rotated, interleaved)] = 1.0
            image = rotate(unit)[:, 0, :, :rotated]  # [B, S, R]
            is_first = torch.zeros(rotated, dtype=torch.bool)
            is_first[_first_of_pairs(rotated, interleaved != regroup)] = True
            cos, sin = columns.find(image[..., is_first]), columns.find(image[..., ~is_first])
            if cos is None or sin is None or not _are_angles(cos, sin):
                continue
            ours = rope.meaning(x, positions, cos, sin, interleaved)
            if regroup:
                ours = ours.unflatten(-1, _grouping(width, interleaved)).transpose(-1, -2).flatten(-2)
            if torch.allclose(ours, y, rtol=1e-5, atol=1e-5):
                return _Rotation(cos, sin, interleaved, regroup)
    return None


def _are_angles(cos: Tensor, sin: Tensor) -> bool:
    """True if these are cosines and sines of angles, up to one common scale.
    A sine that is zero everywhere does not count: that is a product with the cosine alone.
    """
    length = cos.square() + sin.square()
    return bool(sin.any()) and torch.allclose(length, length[0, 0].expand_as(length), rtol=1e-4)


def _first_of_pairs(rotated: int, interleaved: bool) -> slice:
    """The dims that come first in their pairs."""
    return slice(0, rotated, 2) if interleaved else slice(0, rotated // 2)


def _grouping(width: int, interleaved: bool) -> list[int]:
    """Matrix sizes of the last dim; a transpose then swaps the layout of pairs."""
    return [width // 2, 2] if interleaved else [2, width // 2]


def _heads_first(x: Tensor, dims: list[str], length: str) -> Tensor:
    """Bring [B, S, D] or [B, S, H, D] to the op's layout, [B, H, S, D]."""
    return x.unsqueeze(1) if len(dims) == 3 else x.transpose(1, 2) if dims[1] == length else x


class _Wide(Evaluator):
    """Evaluates without casts between floating point dtypes.

    Rounding to half precision would make different table columns equal.
    """

    def _compute(self, node: fx.Node) -> Any:
        if is_call(node, "to", "_to_copy", "type_as") and dtype(node).is_floating_point:
            return self(node.all_input_nodes[0])
        return super()._compute(node)


class _Columns:
    """Finds table columns by their values at the probed positions, up to sign."""

    def __init__(self, program: Program, lookups: list[fx.Node], positions: Tensor) -> None:
        # A frequency of zero needs no lookup: its cosine is one and its sine zero everywhere.
        self.tables = [torch.tensor([[1.0, 0.0]]).expand(program.max_seq_len, 2)]
        for node in lookups:
            if is_op(node, embedding):
                weight = program.weight_of(node.args[1])
                assert weight is not None
                self.tables.append(weight.evaluate().float())
        self.places: dict[bytes, tuple[int, int, float]] = {}  # by content: table, column and sign
        for number, table in enumerate(self.tables):
            for column, values in enumerate(table[positions].flatten(0, 1).T):
                self.places[_content(-values)] = (number, column, -1.0)
        for number, table in enumerate(self.tables):
            for column, values in enumerate(table[positions].flatten(0, 1).T):
                self.places[_content(values)] = (number, column, 1.0)

    def find(self, numbers: Tensor) -> Tensor | None:
        """The table [M, K] with `numbers` [B, S, K] at the probed positions, or None."""
        columns = []
        for values in numbers.flatten(0, 1).T:
            place = self.places.get(_content(values))
            if place is None:
                return None
            number, column, sign = place
            columns.append(self.tables[number][:, column] * sign)
        return torch.stack(columns, dim=1)


def _content(numbers: Tensor) -> bytes:
    return (numbers + 0.0).contiguous().numpy().tobytes()  # adding 0.0 turns -0.0 into 0.0


class _TableWeights:
    """The weights of the tables found so far; equal tables share one weight."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.by_content: dict[bytes, fx.Node] = {}
        self.by_identity: dict[int, fx.Node] = {}

    def node(self, name: str, table: Tensor, like: fx.Node) -> fx.Node:
        if id(table) not in self.by_identity:
            content = _content(table)
            if content not in self.by_content:
                self.by_content[content] = self.program.add_weight(name, constant(table, name), like=like)
            self.by_identity[id(table)] = self.by_content[content]
        return self.by_identity[id(table)]


def _rewrite(program: Program, start: fx.Node, end: fx.Node, rotation: _Rotation, tables: _TableWeights) -> None:
    dims, length = sizes(start), sizes(program.positions)[1]
    cos, sin = tables.node("rope.cos", rotation.cos, end), tables.node("rope.sin", rotation.sin, end)
    with program.graph.inserting_before(end):
        x = start
        if len(dims) == 3:
            x = program.call(aten.unsqueeze.default, x, 1, like=end)
        elif dims[1] == length:
            x = program.call(aten.transpose.int, x, 1, 2, like=end)
        new = program.call(rope, x, program.positions, cos, sin, rotation.interleaved, like=end)
        if rotation.regroup:
            grouping = _grouping(2 * rotation.cos.shape[1], rotation.interleaved)
            new = program.call(aten.unflatten.int, new, -1, grouping, like=end)
            new = program.call(aten.transpose.int, new, -1, -2, like=end)
            new = program.call(aten.flatten.using_ints, new, -2, like=end)
        if len(dims) == 3:
            new = program.call(aten.squeeze.dim, new, 1, like=end)
        elif dims[1] == length:
            new = program.call(aten.transpose.int, new, 1, 2, like=end)
    program.replace(end, new)


def _signature(program: Program, start: fx.Node, region: list[fx.Node]) -> str:
    """A text that is equal for regions that compute the same.

    It lists each call with its arguments. Nodes are numbered from `start`.
    """
    numbers = {start: 0}
    lines = [str(sizes(start))]
    for node in region:
        numbers[node] = len(numbers)

    def show(node: fx.Node) -> str:
        if node in numbers:
            return f"%{numbers[node]}"
        weight = program.weight_of(node)
        return weight.key if weight else str(value_of(node))  # a table or a size

    for node in region:
        lines.append(f"{node.target}{pytree.tree_map_only(fx.Node, show, (list(node.args), dict(node.kwargs)))}")
    return "\n".join(lines)
