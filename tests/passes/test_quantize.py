"""Weights become codes that mean the same, lazily, each once; what can't be rounded stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from check_pass import VOCAB, capture, check_pass, inputs
from torch import Tensor, nn

from llmc.compiler.ir.program import Program
from llmc.compiler.ir.stages import Stage
from llmc.compiler.ir.weights import Leaf, TensorSource
from llmc.errors import LlmcError
from llmc.kernels.ops import embedding, linear, moe, quant_embedding, quant_linear, round_int4, round_int8
from llmc.kernels.ops.quantized import dequantize
from llmc.passes.base import Fuel
from llmc.passes.match import is_op
from llmc.passes.quantize import SCHEMES, Quantize, RoundActivations, Rounding, Scheme, plan_rounding
from llmc.passes.remove_no_ops import RemoveNoOps

WIDTH, INNER = 32, 48
Compute = Callable[["Model", Tensor, Tensor], Tensor]


def on_grid(weight: Tensor, scheme: str, group: int = 16) -> Tensor:
    """A weight that rounding leaves where it is, so that a rounded program computes what it did."""
    if scheme == "int8":
        return dequantize(*round_int8(weight), None, "int8", weight.shape[1])
    codes, scales, multiples = round_int4(weight, group)
    return dequantize(codes, scales, None, "int4", group, multiples=multiples)


class Block(nn.Module):
    def __init__(self, scheme: str, group: int) -> None:
        super().__init__()
        self.up = nn.Parameter(on_grid(torch.randn(INNER, WIDTH), scheme, group) / 8)
        self.down = nn.Parameter(on_grid(torch.randn(WIDTH, INNER), scheme) / 8)
        self.bias = nn.Parameter(torch.randn(INNER))

    def forward(self, x: Tensor) -> Tensor:
        return x + linear(torch.relu(linear(x, self.up, self.bias)), self.down)


class Model(nn.Module):
    """An embedding, two layers whose weights lie on a grid, and a head."""

    def __init__(
        self, scheme: str = "int8", tied: bool = False, compute: Compute | None = None, group: int = 32
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(on_grid(torch.randn(VOCAB, WIDTH), "int8"))
        self.layers = nn.ModuleList(Block(scheme, group) for _ in range(2))
        self.head = self.embed if tied else nn.Parameter(on_grid(torch.randn(VOCAB, WIDTH), "int8"))
        self.places = nn.Parameter(on_grid(torch.randn(32, WIDTH), "int8"))
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
ROUNDED = {"llmc.quant_linear", "llmc.quant_embedding"}


def test_int8() -> None:
    program = check_pass(Quantize(SCHEMES["int8"]), model(), matches=6, gone=LINEARS, there=ROUNDED)
    assert program.stage is Stage.QUANTIZED
    *layers, head = quant_calls(program)
    for call, columns in zip(layers, (WIDTH, INNER, WIDTH, INNER), strict=True):
        assert (call["scheme"], call["group_size"], call["activation"]) == ("int8", columns, "none")
        assert call["multiples"] is None and call["zeros"] is None
    assert (head["scheme"], head["group_size"]) == ("int8", WIDTH)
    assert [call["bias"] is not None for call in layers] == [True, False] * 2
    assert program.weights["layers_0_up_codes"].dtype == torch.int8
    assert program.weights["layers_0_up_scales"].shape == (INNER, 1)


@pytest.mark.parametrize(("wanted", "groups"), [(64, (32, 16)), (16, (16, 16)), (256, (32, 16))])
def test_int4_in_groups_that_divide_the_inputs(wanted: int, groups: tuple[int, int]) -> None:
    scheme = replace(SCHEMES["int4"], group_size=wanted)
    given = model("int4", False, None, groups[0])
    program = check_pass(Quantize(scheme), given, matches=6, gone=LINEARS, there=ROUNDED)
    *layers, head = quant_calls(program)
    assert [(call["scheme"], call["group_size"]) for call in layers] == [("int4", g) for g in groups] * 2
    assert (head["scheme"], head["multiples"]) == ("int8", None), "the head is wide"
    codes, scales, multiples = (program.weights[f"layers_0_down_{part}"] for part in ("codes", "scales", "multiples"))
    assert (codes.dtype, codes.shape) == (torch.uint8, (WIDTH, INNER // 2))
    assert (scales.dtype, scales.shape) == (torch.float32, (WIDTH, 1))
    assert (multiples.dtype, multiples.shape) == (torch.int8, (WIDTH, INNER // groups[1]))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_is_read_twice_is_rounded_once(scheme: str) -> None:
    program = check_pass(Quantize(SCHEMES[scheme]), model(scheme, True), matches=6, gone=LINEARS, there=ROUNDED)
    (rows,) = [n for n in program.nodes if is_op(n, quant_embedding)]
    head = quant_calls(program)[-1]
    assert (head["weight"], head["scales"]) == tuple(rows.args[1:3])


def test_w8a8_rounds_the_inputs_of_linears_but_not_of_the_head() -> None:
    """Rows of the embedding lie on the grid of their largest magnitude: rounding them again changes nothing."""

    def compute(m: Model, x: Tensor, positions: Tensor) -> Tensor:
        first = m.layers[0]
        return linear(linear(x, first.up, first.bias)[..., :WIDTH] + x, m.head)  # type: ignore[union-attr]

    given = model("int8", False, compute)
    for node in given.nodes:
        if is_op(node, linear) and "up" in str(node.args[1]):
            node.meta["where"] = "layers.0"
    program = check_pass(Quantize(SCHEMES["w8a8"]), given, matches=3, gone=LINEARS, there=ROUNDED)
    assert [call["activation"] for call in quant_calls(program)] == ["int8", "none"]


@dataclass(frozen=True)
class Unread(TensorSource):
    def read(self) -> Tensor:
        raise AssertionError("a weight is read while it is planned to be rounded")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_computed_yet(scheme: str) -> None:
    program = model()
    for name, weight in program.weights.items():
        program.weights[name] = Leaf(Unread(weight.evaluate(), name))
    Quantize(SCHEMES[scheme])(program)
    with pytest.raises(AssertionError, match="is read"):
        program(*inputs(1, 2))


def test_fuel_is_burnt() -> None:
    program = model("int8", True)
    before = program(*inputs(2, 5))
    assert Quantize(SCHEMES["int8"])(program, Fuel(3)).matches == 3
    assert (program.ops()["llmc.quant_linear"], program.ops()["llmc.linear"]) == (2, 3)
    assert "embed" in program.weights and "embed_codes" in program.weights, "its other reader has it still"
    torch.testing.assert_close(program(*inputs(2, 5)), before, atol=1e-5, rtol=0)


# The plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_names_each_weight_once() -> None:
    plan = plan_rounding(model("int4", True), replace(SCHEMES["w8a8"], weights="int4"))
    layer = {"up": Rounding("int4", 32, "int8"), "down": Rounding("int4", 16, "int8")}
    assert plan == {"embed": Rounding("int8", WIDTH, "none")} | {
        f"layers.{place}.{name}": rounding for place in range(2) for name, rounding in layer.items()
    }


def test_a_projection_that_is_as_wide_as_the_logits_is_no_head() -> None:
    program = model()
    for node in program.nodes:
        if is_op(node, linear) and str(node.args[1]) == "head":
            node.meta["where"] = "layers.1.mlp"
    assert plan_rounding(program, SCHEMES["int4"])["head"] == Rounding("int4", 32, "none")


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(LlmcError, match="int3") as caught:
        Quantize(Scheme("odd", weights="int3"))(model())
    assert caught.value.code == "SCHEME_UNKNOWN"


# Left alone ---------------------------------------------------------------------------------------------------------


def through_experts(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    ids = torch.zeros_like(positions).flatten().unsqueeze(1)
    shares = torch.ones_like(rows[:, :1])
    return moe(rows, ids, shares, m.experts[0], m.experts[1], None, None, "silu", False).view(x.shape)[..., :VOCAB]


LEFT: dict[str, tuple[Compute, int, str | None]] = {
    "1. a weight that is added": (lambda m, x, p: linear(x, m.head) + m.head.sum(), 1, "reads it too"),
    "2. learned positions": (
        lambda m, x, p: linear(x + embedding(p, m.places), m.head),
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
def test_what_is_no_weight_of_a_linear_alone_is_left(name: str) -> None:
    """The embedding of the tokens is rounded all the same, and so is the head where there is one."""
    compute, matches, reason = LEFT[name]
    program = check_pass(Quantize(SCHEMES["int8"]), model("int8", False, compute), matches=matches, miss=reason)
    kept = program.ops()["llmc.linear"] + program.ops()["llmc.embedding"] + program.ops()["llmc.moe"]
    assert kept == 1


# Activations --------------------------------------------------------------------------------------------------------


def one_layer(scheme: str, activation: str = "none", where: str = "layers.0") -> Program:
    """A linear over rows of the embedding, which lie on the grid of int8, and a head of the same."""

    def compute(m: Model, x: Tensor, positions: Tensor) -> Tensor:
        return linear(linear(x, m.layers[0].up)[..., :WIDTH], m.head)  # type: ignore[union-attr,arg-type]

    program = model("int4" if scheme == "int4" else "int8", False, compute)
    for node in program.nodes:
        if is_op(node, linear) and "up" in str(node.args[1]):
            node.meta["where"] = where
    Quantize(Scheme("one", weights=scheme, activation=activation))(program)
    program.stage = Stage.CACHED
    return program


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_inputs_of_linears_are_rounded(scheme: str) -> None:
    before = one_layer(scheme)
    program = check_pass(RoundActivations(), before, matches=1, atol=1e-4)
    (was, _), (layer, head) = quant_calls(before), quant_calls(program)
    assert (layer["activation"], head["activation"]) == ("int8", "none"), "the head sees one row"
    same = [name for name in layer if name not in ("activation", "x")]
    assert [str(layer[name]) for name in same] == [str(was[name]) for name in same]


def test_inputs_that_are_rounded_already_stay() -> None:
    check_pass(RoundActivations(), one_layer("int8", "int8"), matches=0)


def test_codes_that_are_no_integers_take_inputs_as_they_are() -> None:
    program = one_layer("int8")
    for node in program.nodes:
        if is_op(node, quant_linear) and node.meta["where"]:
            call = quant_linear.bind(node.args, dict(node.kwargs)) | {"scheme": "fp8"}
            with program.graph.inserting_before(node):
                call["weight"] = program.call(torch.ops.aten.to.dtype, call["weight"], torch.float8_e4m3fn, like=node)
            program.replace_with(node, quant_linear, *call.values())
    check_pass(RoundActivations(), program, matches=0)


def test_activations_burn_fuel() -> None:
    assert RoundActivations()(one_layer("int8"), Fuel(0)).matches == 0
