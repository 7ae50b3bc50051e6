"""Parts of norms. Spellings of whole norms are tested with their passes."""

from __future__ import annotations

import torch
from check_pass import VOCAB, capture
from torch import Tensor, nn

from llmc.ir.program import Miss, Program
from llmc.passes.match.norm_parts import Division, affine, divisions, mean_square

WIDTH = 12


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.change(self.embed(tokens))

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BothRoots(Embedded):
    def change(self, x: Tensor) -> Tensor:
        one, two = torch.rsqrt(x.square().mean(-1, True) + 0.25), torch.rsqrt(x.abs().mean(-1, True))
        return one * two * self.weight


class Vector(Embedded):
    def change(self, x: Tensor) -> Tensor:
        return x.square() * x.mean((0, 1))


def calls(program: Program, name: str) -> list[torch.fx.Node]:
    return [n for n in program.nodes if name in str(n.target)]


def test_a_product_of_two_roots_has_two_readings() -> None:
    program = capture(BothRoots())
    readings = list(divisions(calls(program, "mul")[0]))
    assert all(isinstance(reading, Division) for reading in readings)
    assert sorted(reading.eps for reading in readings if isinstance(reading, Division)) == [0.0, 0.25]
    squares = [mean_square(reading.power) for reading in readings if not isinstance(reading, Miss)]
    assert sum(isinstance(found, torch.fx.Node) for found in squares) == 1


def test_a_factor_that_depends_on_an_input_through_a_long_chain_is_no_weight() -> None:
    program = capture(Vector())
    (square,), (mean,), (product,) = (calls(program, name) for name in ("square", "mean", "mul"))
    last = mean
    with program.graph.inserting_before(product):
        for _ in range(2000):
            last = program.graph.call_function(torch.ops.aten.add.Tensor, (last, 1.0))
            last.meta = dict(mean.meta)
    product.replace_input_with(mean, last)
    assert affine(program, square, shifts=True).weight is None
