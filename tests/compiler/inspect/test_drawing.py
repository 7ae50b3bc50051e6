"""Boxes of a section: their contents, and an order in which inputs come first."""

from __future__ import annotations

import pytest
import torch
from check_pass import capture
from stack import Stack
from torch import Tensor, fx

from llmc.compiler.inspect.drawing import Box, Drawing, draw
from llmc.compiler.inspect.layers import OUTSIDE, sections
from llmc.ir.printer import statements
from llmc.ir.program import Program
from llmc.ir.stages import SPEC, Stage
from llmc.kernels.ops import all_ops
from llmc.passes.match.match_rms_norm import MatchRmsNorm

USUAL = (1e-5, "silu")


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Stack(USUAL, USUAL), first=[MatchRmsNorm()])


def drawing(program: Program, layer: str) -> Drawing:
    return draw(layer, sections(program)[layer], statements(program))


def only(boxes: Drawing, op: str) -> Box:
    (box,) = [b for b in boxes if b.op == op]
    return box


def test_a_layer_has_a_box_for_its_input_and_marks_its_output(program: Program) -> None:
    boxes = drawing(program, "layers.1")
    assert [box.kind for box in boxes] == ["input", "norm", "linear", "activation", "arithmetic"]
    norm, linear, add = only(boxes, "llmc.rms_norm"), only(boxes, "aten.linear"), boxes[-1]
    assert boxes[0].op == "aten.add"
    assert norm.inputs == (0,)
    assert add.inputs == (0, 3)
    assert [box.leaves for box in boxes] == [False, False, False, False, True]
    assert (norm.dialect, linear.dialect) == (True, False)
    assert linear.weights == ("layers.1.up.weight", "layers.1.up.bias")
    assert linear.value == "f32[B, S, 8]"
    assert linear.where == "layers.1.up"
    assert linear.text.startswith("linear_1 = aten.linear.default(")


def test_outside_of_the_layers_all_layers_are_one_box(program: Program) -> None:
    boxes = drawing(program, OUTSIDE)
    assert [box.op for box in boxes] == ["tokens", "aten.embedding", "layers", "aten.linear", "aten.view"]
    assert [box.inputs for box in boxes] == [(), (0,), (1,), (2,), (3,)]
    assert [box.leaves for box in boxes] == [False, False, False, False, True]


def test_a_box_comes_after_its_inputs() -> None:
    program = capture(Stack(USUAL, (1e-6, "gelu")))
    for layer in sections(program):
        for index, box in enumerate(drawing(program, layer)):
            assert all(source < index for source in box.inputs)


def test_arithmetic_on_sizes_is_not_drawn() -> None:
    class Reshapes(Stack):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.head(x.view(x.shape[0] * x.shape[1], -1).sin()).view(*tokens.shape, -1)

    program = capture(Reshapes())
    assert program.ops()["mul"] == 1  # otherwise the test checks nothing
    boxes = drawing(program, OUTSIDE)
    assert not {"mul", "aten.sym_size"} & {box.op for box in boxes}
    assert {box.op: box.kind for box in boxes}["aten.view"] == "view"


def test_every_op_of_the_dialect_has_a_kind() -> None:
    graph = fx.Graph()
    for name in SPEC[Stage.CAPTURED].dialect | SPEC[Stage.CACHED].dialect:
        graph.call_function(all_ops()[name].overload).meta["val"] = torch.empty(0)
    boxes = draw(OUTSIDE, list(graph.nodes), dict.fromkeys(graph.nodes, ""))
    assert {"llmc.quant_linear", "llmc.attention"} <= {box.op for box in boxes}
    assert not [box.op for box in boxes if box.kind in ("arithmetic", "view")]
