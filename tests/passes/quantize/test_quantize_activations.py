"""QuantizeActivations quantizes inputs per token; QuantizeInKernels leaves it to kernels."""

from __future__ import annotations

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from schemes import scheme as make_scheme
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import constant
from llmc.kernels.ops import embedding, linear, quant_linear, round_weight
from llmc.kernels.ops.quantized import dequantize
from llmc.passes.base import Fuel
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.quantize.quantization_plan import analyse
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.quantize_activations import QuantizeActivations, QuantizeInKernels
from llmc.passes.quantize.schemes import Grid
from llmc.passes.queries import is_op

WIDTH, INNER = 32, 48


def on_int8_grid(*shape: int) -> Tensor:
    """Random vectors on an int8 grid, so that rounding does not change them."""
    codes, scales, _, _ = round_weight(torch.randn(*shape), "int8", shape[1], True)
    return dequantize(codes, scales, None, "int8", shape[1])


class OneLayer(nn.Module):
    """An embedding, a linear and an LM head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(on_int8_grid(VOCAB, WIDTH))
        self.layers = nn.ModuleList([nn.Linear(WIDTH, INNER, bias=False)])
        self.head = nn.Parameter(on_int8_grid(VOCAB, INNER))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return linear(linear(embedding(tokens, self.embed), self.layers[0].weight), self.head)


def calls(program: Program) -> list[dict[str, object]]:
    return [quant_linear.bind(n.args, dict(n.kwargs)) for n in program.nodes if is_op(n, quant_linear)]


def one_layer(grid: Grid) -> Program:
    program = capture(OneLayer(), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)
    Quantize(analyse(program, make_scheme("one", grid, Grid("int8"))))(program)
    program.stage = Stage.CACHED
    return program


@pytest.mark.parametrize("grid", [Grid("int8"), Grid("int4", 16), Grid("int4", 16, symmetric=False)])
def test_inputs_of_linears_are_quantized(grid: Grid) -> None:
    before = one_layer(grid)
    program = check_pass(QuantizeActivations(), before, matches=1, atol=1e-4)
    (old, _), (layer, head) = calls(before), calls(program)
    assert (layer["activation"], head["activation"]) == ("int8", "none"), "the LM head runs on one token"
    same = [name for name in layer if name not in ("activation", "x")]
    assert [str(layer[name]) for name in same] == [str(old[name]) for name in same]


LEFT = {
    "4. inputs that are rounded already": (Grid("int8", activation="int8"), None),
    "4. floats": (Grid("fp8"), None),
    "4. nf4": (Grid("nf4", 16), None),
    "2. a scale per group": (Grid("int8", 16), "a scale per group"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_linears_are_left_alone(name: str) -> None:
    grid, reason = LEFT[name]
    check_pass(QuantizeActivations(), one_layer(grid), matches=0, miss=reason)


def test_3_exact_inputs_are_left_alone() -> None:
    program = one_layer(Grid("int8"))
    check_pass(QuantizeActivations(["layers.0.weight"]), program, matches=0, miss="to stay exact")
    assert QuantizeActivations(["layers.0"])(program).matches == 1


def test_fuel() -> None:
    assert QuantizeActivations()(one_layer(Grid("int8")), Fuel(0)).matches == 0


QUANTIZED = {"int8": Grid("int8", activation="int8"), "int4": Grid("int4", 16, activation="int8")}


@pytest.mark.parametrize("name", QUANTIZED)
def test_kernels_quantize_inputs(name: str) -> None:
    before = one_layer(QUANTIZED[name])
    program = check_pass(QuantizeInKernels(), before, matches=1, atol=0.02)
    (old, _), (layer, _) = calls(before), calls(program)
    assert (old["activation"], layer["activation"]) == ("int8", "none")
    same = [part for part in layer if part not in ("activation", "x")]
    assert [str(layer[part]) for part in same] == [str(old[part]) for part in same]


NOT_FOR_KERNELS = {
    "inputs that are not rounded": (Grid("int8"), None),
    "2. 8-bit floats": (Grid("fp8", activation="fp8"), None),
}


@pytest.mark.parametrize("name", NOT_FOR_KERNELS)
def test_other_inputs_are_left_alone(name: str) -> None:
    grid, reason = NOT_FOR_KERNELS[name]
    check_pass(QuantizeInKernels(), one_layer(grid), matches=0, miss=reason)


def test_1_a_scale_from_calibration_is_left_alone() -> None:
    program = one_layer(Grid("int8", activation="int8"))
    (node, _) = (node for node in program.nodes if is_op(node, quant_linear))
    call = quant_linear.bind(node.args, dict(node.kwargs))
    scale = program.add_weight("x_scale", constant(torch.tensor(0.02), "x_scale"), like=node)
    program.replace_with(node, quant_linear, *(call | {"x_scale": scale}).values())
    check_pass(QuantizeInKernels(), program, matches=0, miss="a scale from calibration")
