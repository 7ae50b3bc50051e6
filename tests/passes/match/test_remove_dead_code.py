"""RemoveDeadCode removes unused calls and weights; inputs stay."""

from __future__ import annotations

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.weights import constant
from llmc.passes.match.remove_dead_code import RemoveDeadCode
from llmc.passes.match.remove_no_ops import RemoveNoOps

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


@pytest.fixture
def program() -> Program:
    return capture(Model(), first=[RemoveNoOps()])


def test_removes_unused_calls_and_weights(program: Program) -> None:
    want = str(program)
    head = program.output
    with program.graph.inserting_before(head):
        first = program.call(aten.neg.default, head.args[0], like=head)
        weight = program.add_weight("unused", constant(torch.ones(3), "unused"), like=head)
        program.call(aten.sin.default, first, like=head)
        program.call(aten.sin.default, weight, like=head)
    result = check_pass(RemoveDeadCode(), program, matches=4, gone={"aten.neg", "aten.sin"})
    assert str(result) == want and "unused" not in result.weights


def test_unused_inputs_stay(program: Program) -> None:
    """1. This model does not use its positions."""
    assert not program.inputs[1].users
    result = check_pass(RemoveDeadCode(), program, matches=0)
    assert [node.name for node in result.inputs] == ["tokens", "positions"]
