"""Inputs of linears over integers are rounded by row for many rows, and left to the kernel for few."""

from __future__ import annotations

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import constant
from llmc.kernels.ops import embedding, linear, quant_linear, round_weight
from llmc.kernels.ops.quantized import dequantize
from llmc.passes.base import Fuel
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.round_activations import RoundActivations, RoundInKernels
from llmc.passes.quantize.rounding_plan import Grid, Scheme, analyse
from llmc.passes.queries import is_op

WIDTH, INNER = 32, 48


def by_row(*shape: int) -> Tensor:
    """Random rows on the grid of int8 with one scale each, on which rounding leaves them where they are."""
    codes, scales, _, _ = round_weight(torch.randn(*shape), "int8", shape[1], True)
    return dequantize(codes, scales, None, "int8", shape[1])


class OneLayer(nn.Module):
    """A linear over rows of the embedding, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(by_row(VOCAB, WIDTH))
        self.layers = nn.ModuleList([nn.Linear(WIDTH, INNER, bias=False)])
        self.head = nn.Parameter(by_row(VOCAB, INNER))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return linear(linear(embedding(tokens, self.embed), self.layers[0].weight), self.head)


def calls(program: Program) -> list[dict[str, object]]:
    return [quant_linear.bind(n.args, dict(n.kwargs)) for n in program.nodes if is_op(n, quant_linear)]


def one_layer(grid: Grid) -> Program:
    program = capture(OneLayer(), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)
    Quantize(analyse(program, Scheme("one", grid, Grid("int8"))))(program)
    program.stage = Stage.CACHED
    return program


@pytest.mark.parametrize("grid", [Grid("int8"), Grid("int4", 16), Grid("int4", 16, symmetric=False)])
def test_inputs_of_linears_are_rounded(grid: Grid) -> None:
    before = one_layer(grid)
    program = check_pass(RoundActivations(), before, matches=1, atol=1e-4)
    (was, _), (layer, head) = calls(before), calls(program)
    assert (layer["activation"], head["activation"]) == ("int8", "none"), "the head sees one row"
    same = [name for name in layer if name not in ("activation", "x")]
    assert [str(layer[name]) for name in same] == [str(was[name]) for name in same]


LEFT_AS_THEY_ARE = {
    "inputs that are rounded already": (Grid("int8", activation="int8"), None),
    "floats": (Grid("fp8"), None),
    "levels": (Grid("nf4", 16), None),
    "groups with scales of their own": (Grid("int8", 16), "scales of their own"),
}


@pytest.mark.parametrize("name", LEFT_AS_THEY_ARE)
def test_what_integer_kernels_do_not_take_is_left(name: str) -> None:
    grid, reason = LEFT_AS_THEY_ARE[name]
    check_pass(RoundActivations(), one_layer(grid), matches=0, miss=reason)


def test_what_is_to_stay_exact_is_left() -> None:
    program = one_layer(Grid("int8"))
    check_pass(RoundActivations(["layers.0.weight"]), program, matches=0, miss="worth more than speed")
    assert RoundActivations(["layers.0"])(program).matches == 1


def test_activations_burn_fuel() -> None:
    assert RoundActivations()(one_layer(Grid("int8")), Fuel(0)).matches == 0


ROUNDED = {"int8": Grid("int8", activation="int8"), "int4": Grid("int4", 16, activation="int8")}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_left_to_kernels(name: str) -> None:
    before = one_layer(ROUNDED[name])
    program = check_pass(RoundInKernels(), before, matches=1, atol=0.02)
    (was, _), (layer, _) = calls(before), calls(program)
    assert (was["activation"], layer["activation"]) == ("int8", "none")
    same = [part for part in layer if part not in ("activation", "x")]
    assert [str(layer[part]) for part in same] == [str(was[part]) for part in same]


NOT_LEFT = {
    "nothing is rounded": (Grid("int8"), None),
    "floats of 8 bits": (Grid("fp8", activation="fp8"), None),
}


@pytest.mark.parametrize("name", NOT_LEFT)
def test_other_inputs_stay_as_they_are(name: str) -> None:
    grid, reason = NOT_LEFT[name]
    check_pass(RoundInKernels(), one_layer(grid), matches=0, miss=reason)


def test_a_scale_from_calibration_stays() -> None:
    program = one_layer(Grid("int8", activation="int8"))
    (node, _) = (node for node in program.nodes if is_op(node, quant_linear))
    call = quant_linear.bind(node.args, dict(node.kwargs))
    scale = program.add_weight("x_scale", constant(torch.tensor(0.02), "x_scale"), like=node)
    program.replace_with(node, quant_linear, *(call | {"x_scale": scale}).values())
    check_pass(RoundInKernels(), program, matches=0, miss="a scale from calibration")
