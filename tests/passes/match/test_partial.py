"""Evaluation of single nodes, and the nodes that depend on positions alone."""

from __future__ import annotations

import pytest
import torch
from check_pass import VOCAB, capture
from torch import Tensor, fx, nn

from llmc.ir.program import Program, op_name
from llmc.ir.weights import Leaf, TensorSource
from llmc.passes.match.partial import Evaluator, depends_on_positions


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 4)
        self.head = nn.Linear(4, VOCAB)
        self.trained = nn.Parameter(torch.rand(4))
        self.frequencies = nn.Buffer(torch.rand(4))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens)
        steps = torch.arange(tokens.shape[1]).float().exp()
        cos = (positions[..., None].float() * self.frequencies).cos()
        sin = (positions[..., None].float() * self.trained).sin()
        return self.head(x * cos + sin + steps[:, None].tan().sigmoid() + self.frequencies.sqrt())


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Model())


def the(program: Program, name: str) -> fx.Node:
    (node,) = [n for n in program.nodes if n.op == "call_function" and op_name(n) == f"aten.{name}"]
    return node


def test_finds_the_nodes_that_depend_on_positions_alone(program: Program) -> None:
    names = {op_name(node) for node in depends_on_positions(program)}
    assert "aten.cos" in names
    assert not names & {"aten.sin", "aten.embedding", "aten.linear", "aten.exp", "aten.sigmoid", "aten.sqrt"}
    assert not names & {"aten.sym_size"}, "a size does not depend on positions"


def test_evaluates_at_given_positions(program: Program) -> None:
    positions = torch.tensor([[3, 1, 4], [1, 5, 9]])
    value = Evaluator(program, positions)(the(program, "cos"))
    torch.testing.assert_close(value, (positions[..., None] * Model().frequencies).cos())


def test_takes_sizes_from_the_positions(program: Program) -> None:
    value = Evaluator(program, torch.zeros(2, 5, dtype=torch.long))(the(program, "exp"))
    torch.testing.assert_close(value, torch.arange(5.0).exp())


def test_stops_at_given_values(program: Program) -> None:
    cos = the(program, "cos")
    (product,) = [n for n in program.nodes if cos in n.all_input_nodes]
    (other,) = [n for n in product.all_input_nodes if n is not cos]
    given = {cos: torch.full((1, 2, 4), 2.0), other: torch.arange(4.0).expand(1, 2, 4)}
    assert torch.equal(Evaluator(program, torch.zeros(1, 2, dtype=torch.long), given)(product), 2 * given[other])


def test_an_input_without_a_value_is_an_error(program: Program) -> None:
    with pytest.raises(KeyError, match="no value was given for the input tokens"):
        Evaluator(program, torch.zeros(1, 2, dtype=torch.long))(the(program, "embedding"))


def test_reads_only_the_weights_it_needs_and_each_once(program: Program) -> None:
    twin, reads = program.copy(), []

    class Counted(TensorSource):
        def read(self) -> Tensor:
            reads.append(self.name)
            return super().read()

    for name, weight in twin.weights.items():
        twin.weights[name] = Leaf(Counted(weight.evaluate(), name))
    evaluate = Evaluator(twin, torch.zeros(1, 2, dtype=torch.long))
    evaluate(the(twin, "cos"))
    evaluate(the(twin, "sqrt"))
    assert reads == ["frequencies"]
