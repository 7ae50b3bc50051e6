"""Layers are grouped exactly if their calls are identical."""

from __future__ import annotations

from itertools import chain

import pytest
from check_pass import capture
from stack import Stack
from torch import Tensor, nn

from llmc.compiler.inspect.layers import OUTSIDE, count_ops, fold, label, sections, signature
from llmc.ir.printer import statements, to_python

USUAL = (1e-5, "silu")


def kinds(module: nn.Module) -> list[list[str]]:
    parts = sections(capture(module))
    return fold({layer: signature(layer, nodes) for layer, nodes in parts.items() if layer != OUTSIDE})


def test_layers_that_differ_in_weight_values_are_identical() -> None:
    assert kinds(Stack(USUAL, USUAL, USUAL)) == [["layers.0", "layers.1", "layers.2"]]


@pytest.mark.parametrize("other", [(1e-6, "silu"), (1e-5, "gelu")], ids=["a number", "an op"])
def test_a_layer_with_another_computation_is_not_identical(other: tuple[float, str]) -> None:
    assert kinds(Stack(USUAL, other, USUAL)) == [["layers.0", "layers.2"], ["layers.1"]]


def test_layers_of_different_widths_are_not_identical() -> None:
    class Wide(Stack):
        def __init__(self) -> None:
            super().__init__(USUAL, USUAL)
            self.layers[1].up = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
            self.layers[0].up = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8))

    assert kinds(Wide()) == [["layers.0"], ["layers.1"]]


def test_layers_with_different_connections_are_not_identical() -> None:
    class Layer(nn.Module):
        def __init__(self, swapped: bool) -> None:
            super().__init__()
            self.swapped = swapped

        def forward(self, x: Tensor) -> Tensor:
            y, z = x.sin(), x.cos()
            return z - y if self.swapped else y - z

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.layers.extend(Layer(swapped) for swapped in (False, True, False))

    assert kinds(Model()) == [["layers.0", "layers.2"], ["layers.1"]]


def test_a_layer_with_a_shared_weight_is_not_identical_to_one_without() -> None:
    class Tied(Stack):
        def __init__(self) -> None:
            super().__init__(USUAL, USUAL, USUAL)
            self.layers[2].scale = self.layers[1].scale

    assert kinds(Tied()) == [["layers.0", "layers.1"], ["layers.2"]]


def test_sections_contain_every_call_once_and_in_order() -> None:
    program = capture(Stack(USUAL, USUAL))
    parts = sections(program)
    assert list(parts) == [OUTSIDE, "layers.0", "layers.1"]
    calls = [node for node in program.nodes if node.op == "call_function"]
    assert sorted(map(calls.index, chain(*parts.values()))) == list(range(len(calls)))
    assert all(list(map(calls.index, nodes)) == sorted(map(calls.index, nodes)) for nodes in parts.values())
    assert count_ops(parts["layers.1"])["aten.mul"] == 2


def test_each_statement_is_the_line_that_defines_its_node() -> None:
    program = capture(Stack(USUAL))
    lines = statements(program)
    printed = to_python(program).splitlines()
    for node, line in lines.items():
        assert f"    {line}" in printed
        assert line.startswith((f"{node.name} = ", "B = ", "S = "))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["model.layers.0"], "model.layers.0"),
        ([f"h.{n}" for n in (0, 1, 2, 4, 6, 7)], "h.0-2, 4, 6-7"),
        (["enc.0", "enc.1", "dec.0"], "enc.0-1, dec.0"),
        ([OUTSIDE], "outside of the layers"),
    ],
)
def test_label(layers: list[str], expected: str) -> None:
    assert label(layers) == expected
