"""Regions: parts of a graph that combine one value with looked-up tables linearly."""

from __future__ import annotations

from check_pass import capture
from rotations import Model, Rotate, halves, llama, tables
from torch import Tensor, fx

from llmc.ir.program import Program, op_name
from llmc.passes.match.precompute_positions import PrecomputePositions
from llmc.passes.match.rope_regions import Regions, sizes
from llmc.passes.queries import is_call


def captured(rotate: Rotate) -> Program:
    return capture(Model(rotate), first=[PrecomputePositions()])


def the(program: Program, op: str) -> fx.Node:
    (node,) = (n for n in program.nodes if is_call(n, op))
    return node


def test_a_region_reaches_from_the_rotated_value_to_its_sum() -> None:
    program = captured(lambda m, x, p: llama(m, x.sin(), p))
    regions, x, end = Regions(program), the(program, "sin"), the(program, "add")
    assert {op_name(node) for node in regions.mixed} >= {"aten.mul", "aten.add"}
    assert list(regions.starts(end)) == [x]
    region = regions.between(x, end)
    assert region[-1] is end and x not in region
    assert sorted(op_name(n) for n in region if is_call(n, "mul", "neg", "cat")) == [
        "aten.cat",
        "aten.mul",
        "aten.mul",
        "aten.neg",
    ]
    lookups = regions.lookups(region)
    assert set(lookups) <= regions.tables
    assert [op_name(n) for n in lookups].count("llmc.embedding") == 2


def test_two_values_have_no_common_start() -> None:
    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1) for t in tables(m.frequencies, p))
        return x.sin() * cos + x.exp() * sin

    program = captured(rotate)
    assert list(Regions(program).starts(the(program, "add"))) == []


def test_the_starts_of_successive_rotations_are_nearest_first() -> None:
    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        x = x.sin()
        for frequencies in (m.frequencies, m.local):
            cos, sin = (t.unsqueeze(1) for t in tables(frequencies, p))
            x = halves(x, cos, sin)
        return x

    program = captured(rotate)
    first, second = (node for node in program.nodes if is_call(node, "add"))
    assert list(Regions(program).starts(second)) == [first, the(program, "sin")]


def test_a_product_of_two_values_is_not_linear() -> None:
    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        cos, _ = (t.unsqueeze(1) for t in tables(m.frequencies, p))
        return (x.sin() * x.exp()) * cos

    program = captured(rotate)
    values, table = (node for node in program.nodes if is_call(node, "mul"))
    assert Regions(program).mixed == [table]
    assert list(Regions(program).starts(table)) == [values]


def test_sizes_are_texts() -> None:
    program = captured(llama)
    assert sizes(the(program, "tanh"))[1::2] == ["3", "8"]
