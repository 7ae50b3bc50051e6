"""Quantize replaces weights by codes of equal value, lazily and once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from check_pass import VOCAB, capture, check_pass, inputs
from schemes import SCHEMES
from schemes import scheme as make_scheme
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.stored import StoredCodes
from llmc.ir.weights import Leaf, TensorSource, constant, parameter
from llmc.kernels.ops import embedding, linear, moe, quant_embedding, quant_linear, round_weight
from llmc.kernels.ops.quantized import dequantize
from llmc.passes.base import Fuel
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.quantize.quantization_plan import Choice, QuantizationPlan, analyse
from llmc.passes.quantize.quantize import Quantize, QuantizedWeight
from llmc.passes.quantize.schemes import Grid, Scheme
from llmc.passes.queries import is_op

WIDTH, INNER = 32, 48
Compute = Callable[["Model", Tensor, Tensor], Tensor]

# Groups are of 16, which divides the inputs of all weights here.
GRIDS = {
    "int8": Grid("int8", 16),
    "int8 per channel": Grid("int8"),
    "int4": Grid("int4", 16),
    "int4 with zeros": Grid("int4", 16, symmetric=False),
    "fp8": Grid("fp8"),
    "fp8 per tensor": Grid("fp8", "tensor"),
    "nf4": Grid("nf4", 16),
}
WIDE = Grid("int8", 16)


def scheme(name: str) -> Scheme:
    return make_scheme(name, GRIDS[name], WIDE)


def on_grid(weight: Tensor, grid: Grid) -> Tensor:
    """Round a weight to the grid, so that quantizing it later does not change it."""
    group = grid.group if isinstance(grid.group, int) else 0 if grid.group == "tensor" else weight.shape[1]
    codes, scales, zeros, multiples = round_weight(weight, grid.scheme, group, grid.symmetric)
    arguments = zeros if zeros.numel() else None, grid.scheme, group or weight.shape[1], torch.float32
    return dequantize(codes, scales, *arguments, multiples if multiples.numel() else None)


def even(*shape: int) -> Tensor:
    """A weight whose groups of 16 all span -0.5 to 1.

    Their multiples are large, and quantizing it again finds the same ones.
    """
    weight = torch.rand(*shape) * 1.5 - 0.5
    weight[:, 0::16], weight[:, 1::16] = 1, -0.5
    return weight


class Block(nn.Module):
    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.up = nn.Parameter(on_grid(even(INNER, WIDTH), grid) / 8)
        self.down = nn.Parameter(on_grid(even(WIDTH, INNER), grid) / 8)
        self.bias = nn.Parameter(torch.randn(INNER))

    def forward(self, x: Tensor) -> Tensor:
        return x + linear(torch.relu(linear(x, self.up, self.bias)), self.down)


class Model(nn.Module):
    """An embedding, two layers with weights on a grid, and an LM head."""

    def __init__(self, name: str = "int8", tied: bool = False, compute: Compute | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(on_grid(torch.randn(VOCAB, WIDTH), WIDE))
        self.layers = nn.ModuleList(Block(GRIDS[name]) for _ in range(2))
        self.head = self.embed if tied else nn.Parameter(on_grid(torch.randn(VOCAB, WIDTH), WIDE))
        self.learned_positions = nn.Parameter(on_grid(torch.randn(32, WIDTH), WIDE))
        self.table = nn.Buffer(torch.randn(32, WIDTH))
        self.odd = nn.Parameter(torch.randn(VOCAB, 12))
        self.experts = nn.ParameterList([torch.randn(2, 16, WIDTH), torch.randn(2, WIDTH, 16)])
        self.compute = compute

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = embedding(tokens, self.embed)
        if self.compute is not None:
            return self.compute(self, x, positions)
        for layer in self.layers:
            x = layer(x)
        return linear(x, self.head)


def model(*args: Any, stage: Stage = Stage.OPTIMIZED) -> Program:
    return capture(Model(*args), first=[RemoveNoOps()], stage=stage)


def quant_calls(program: Program) -> list[dict[str, Any]]:
    return [quant_linear.bind(n.args, dict(n.kwargs)) for n in program.nodes if is_op(n, quant_linear)]


LINEARS = {"llmc.linear", "llmc.embedding"}
QUANTIZED = {"llmc.quant_linear", "llmc.quant_embedding"}


def quantize(program: Program, chosen: Scheme) -> Quantize:
    return Quantize(analyse(program, chosen))


# Dtype and shape of the parts of a weight [48, 32].
PARTS: dict[str, dict[str, tuple[torch.dtype, tuple[int, int]]]] = {
    "int8": {"codes": (torch.int8, (48, 32)), "scales": (torch.float32, (48, 2))},
    "int8 per channel": {"codes": (torch.int8, (48, 32)), "scales": (torch.float32, (48, 1))},
    "int4": {
        "codes": (torch.uint8, (48, 16)),
        "scales": (torch.float32, (48, 1)),
        "multiples": (torch.int8, (48, 2)),
    },
    "int4 with zeros": {
        "codes": (torch.uint8, (48, 16)),
        "scales": (torch.float32, (48, 1)),
        "zeros": (torch.uint8, (48, 2)),
        "multiples": (torch.int8, (48, 2)),
    },
    "fp8": {"codes": (torch.float8_e4m3fn, (48, 32)), "scales": (torch.float32, (48, 1))},
    "fp8 per tensor": {"codes": (torch.float8_e4m3fn, (48, 32)), "scales": (torch.float32, (48, 1))},
    "nf4": {"codes": (torch.uint8, (48, 16)), "scales": (torch.float32, (48, 2))},
}


@pytest.mark.parametrize("name", GRIDS)
def test_weights_become_codes(name: str) -> None:
    before = model(name)
    program = check_pass(quantize(before, scheme(name)), before, matches=6, gone=LINEARS, there=QUANTIZED)
    assert program.stage is Stage.QUANTIZED
    *layers, head = quant_calls(program)
    is_grouped = isinstance(GRIDS[name].group, int)
    for call, channels in zip(layers, (WIDTH, INNER, WIDTH, INNER), strict=True):
        assert (call["scheme"], call["group_size"]) == (GRIDS[name].scheme, 16 if is_grouped else channels)
        assert (call["activation"], call["x_scale"]) == ("none", None)
    assert (head["scheme"], head["group_size"], head["multiples"]) == ("int8", 16, None), "the head is wide"
    assert [call["bias"] is not None for call in layers] == [True, False] * 2
    parts = {n.removeprefix("layers_0_up_"): w for n, w in program.weights.items() if n.startswith("layers_0_up_")}
    assert {part: (weight.dtype, weight.shape) for part, weight in parts.items()} == PARTS[name]


@pytest.mark.parametrize(("wanted", "groups"), [(64, (32, 16)), (32, (32, 16)), (16, (16, 16)), (256, (32, 16))])
def test_groups_divide_the_inputs(wanted: int, groups: tuple[int, int]) -> None:
    program = model()
    quantize(program, make_scheme("one", Grid("int4", wanted)))(program)
    assert [call["group_size"] for call in quant_calls(program)[:-1]] == [*groups] * 2


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_shared_weight_is_quantized_once(name: str) -> None:
    before = model(name, True)
    program = check_pass(quantize(before, scheme(name)), before, matches=6, gone=LINEARS, there=QUANTIZED)
    (lookup,) = [n for n in program.nodes if is_op(n, quant_embedding)]
    head = quant_calls(program)[-1]
    assert (head["weight"], head["scales"]) == tuple(lookup.args[1:3])


def test_an_int4_embedding_has_multiples() -> None:
    torch.manual_seed(0)
    before = model("int4", True, None)
    before.weights["embed"] = constant(on_grid(even(VOCAB, WIDTH), GRIDS["int4 with zeros"]), "embed")
    plan = QuantizationPlan("one", {"embed": Choice(GRIDS["int4 with zeros"], "a test", 16, True)})
    program = check_pass(Quantize(plan), before, matches=2, gone={"llmc.embedding"}, there=QUANTIZED)
    (lookup,) = [n for n in program.nodes if is_op(n, quant_embedding)]
    call = quant_embedding.bind(lookup.args, dict(lookup.kwargs))
    assert [str(call[part]) for part in ("zeros", "multiples")] == ["embed_zeros", "embed_multiples"]


def test_w8a8_quantizes_inputs_of_linears_but_not_of_the_head() -> None:
    """The embeddings are on an int8 grid, so rounding them again changes nothing."""
    before = model("int8 per channel", False, lambda m, x, p: linear(linear(x, m.layers[0].up)[..., :WIDTH], m.head))
    for name in ("embed", "head"):
        before.weights[name] = parameter(on_grid(before.weights[name].evaluate(), Grid("int8")), name)
    plan = analyse(before, make_scheme("one", Grid("int8", activation="int8"), Grid("int8")))
    program = check_pass(Quantize(plan), before, matches=3, gone=LINEARS, there=QUANTIZED)
    assert [call["activation"] for call in quant_calls(program)] == ["int8", "none"]


def test_calibrated_weights_are_used() -> None:
    program = model()
    parts = {
        "codes": torch.ones(INNER, WIDTH // 2, dtype=torch.uint8),
        "scales": torch.ones(INNER, 1),
        "zeros": torch.ones(INNER, 2, dtype=torch.uint8),
        "multiples": torch.ones(INNER, 2, dtype=torch.int8),
        "x_scale": torch.tensor(0.5),
    }
    rounded = QuantizedWeight(**{name: constant(value, name) for name, value in parts.items()})
    grid = Grid("int4", 16, symmetric=False, activation="int8", static=True)
    plan = QuantizationPlan("one", {"layers.0.up": Choice(grid, "a test", 16)})
    assert Quantize(plan, {"layers.0.up": rounded})(program).matches == 1
    (call,) = quant_calls(program)
    assert (call["activation"], str(call["x_scale"])) == ("int8", "layers_0_up_x_scale")
    for name, value in parts.items():
        assert torch.equal(program.weights[f"layers_0_up_{name}"].evaluate(), value)


@pytest.mark.parametrize("zeros", [True, False])
def test_stored_codes_are_used_unchanged(zeros: bool) -> None:
    program = model()
    codes = torch.randint(256, (INNER, WIDTH // 2), dtype=torch.uint8)
    points = constant(torch.randint(16, (INNER, 2), dtype=torch.uint8), "zeros") if zeros else None
    stored = StoredCodes(constant(codes, "codes"), parameter(torch.rand(INNER, 2), "scales"), points, "int4", 16)
    program.weights["layers.0.up"] = stored
    before = program(*inputs(2, 5))
    quantize(program, make_scheme("none", None, None))(program)
    (call,) = quant_calls(program)
    assert (call["scheme"], call["group_size"], call["multiples"]) == ("int4", 16, None)
    assert (call["zeros"] is not None) == zeros
    assert torch.equal(program.weights["layers_0_up_codes"].evaluate(), codes)
    torch.testing.assert_close(program(*inputs(2, 5)), before, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Unread(TensorSource):
    def read(self) -> Tensor:
        raise AssertionError("a weight is read during planning")


@pytest.mark.parametrize("name", SCHEMES)
def test_no_weight_is_read(name: str) -> None:
    program = model()
    for key, weight in program.weights.items():
        program.weights[key] = Leaf(Unread(weight.evaluate(), key))
    quantize(program, SCHEMES[name])(program)
    with pytest.raises(AssertionError, match="is read"):
        program(*inputs(1, 2))


def test_fuel() -> None:
    program = model("int8", True)
    before = program(*inputs(2, 5))
    assert quantize(program, scheme("int8"))(program, Fuel(3)).matches == 3
    assert (program.ops()["llmc.quant_linear"], program.ops()["llmc.linear"]) == (2, 3)
    assert "embed" in program.weights and "embed_codes" in program.weights, "its other user keeps it"
    torch.testing.assert_close(program(*inputs(2, 5)), before, atol=1e-5, rtol=0)


# Left alone ---------------------------------------------------------------------------------------------------------


def through_experts(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    ids = torch.zeros_like(positions).flatten().unsqueeze(1)
    shares = torch.ones_like(tokens[:, :1])
    return moe(tokens, ids, shares, m.experts[0], m.experts[1], None, None, "silu", False).view(x.shape)[..., :VOCAB]


LEFT: dict[str, tuple[Compute, int, str | None]] = {
    "1. a weight that is added": (lambda m, x, p: linear(x, m.head) + m.head.sum(), 1, "reads it too"),
    "2. learned positions": (
        lambda m, x, p: linear(x + embedding(p, m.learned_positions), m.head),
        2,
        "by something else than tokens",
    ),
    "3. groups of four": (lambda m, x, p: linear(x[..., :12], m.odd), 1, "12 inputs don't divide"),
    "4. experts": (through_experts, 1, None),
    "a table of the architecture": (lambda m, x, p: linear(x + embedding(p, m.table), m.head), 2, None),
    "a matrix of the architecture": (lambda m, x, p: linear(x, m.table), 1, None),
    "a computed matrix": (lambda m, x, p: linear(x, m.head * 2), 1, None),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_weights_are_left_alone(name: str) -> None:
    """The token embedding and the LM head are quantized all the same."""
    compute, matches, reason = LEFT[name]
    before = model("int8", False, compute)
    program = check_pass(quantize(before, scheme("int8")), before, matches=matches, miss=reason)
    kept = program.ops()["llmc.linear"] + program.ops()["llmc.embedding"] + program.ops()["llmc.moe"]
    assert kept == 1
