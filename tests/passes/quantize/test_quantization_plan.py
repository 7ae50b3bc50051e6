"""The plan gives each weight a format and a reason before anything is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from check_pass import VOCAB, capture
from schemes import SCHEMES, STORED
from schemes import scheme as make_scheme
from torch import Tensor, nn

from llmc.errors import LlmcError
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.stored import OnlyNumbers, StoredCodes
from llmc.ir.weights import constant, parameter
from llmc.kernels.ops import embedding, linear
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.quantize.quantization_plan import Choice, QuantizationPlan, analyse
from llmc.passes.quantize.schemes import Grid, Override, Scheme
from llmc.passes.queries import is_op

WIDTH, INNER = 192, 48


class Model(nn.Module):
    """An embedding, two layers and a head."""

    def __init__(self, compute: Callable[[Model, Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Module()
            layer.up, layer.down = nn.Parameter(torch.randn(INNER, WIDTH)), nn.Parameter(torch.randn(WIDTH, INNER))
            self.layers.append(layer)
        self.head = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.odd = nn.Parameter(torch.randn(WIDTH, 12))
        self.places = nn.Parameter(torch.randn(32, WIDTH))
        self.table = nn.Buffer(torch.randn(VOCAB, WIDTH))
        self.compute = compute

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = embedding(tokens, self.embed)
        if self.compute is not None:
            return self.compute(self, x, positions)
        for layer in self.layers:
            x = linear(linear(x, layer.up), layer.down)
        return linear(x, self.head)


def model(compute: Callable[[Model, Tensor, Tensor], Tensor] | None = None) -> Program:
    return capture(Model(compute), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)


def choices(plan: QuantizationPlan) -> dict[str, tuple[str, int] | None]:
    return {name: (c.grid.scheme, c.group_size) if c.grid else None for name, c in plan.weights.items()}


# Groups of what has 192 and what has 48 inputs.
CHOSEN = {"int8": (64, 16), "int4": (32, 16), "w8a8": (WIDTH, INNER), "fp8": (WIDTH, INNER), "nf4": (64, 16)}


@pytest.mark.parametrize("name", SCHEMES)
def test_each_weight_has_a_grid(name: str) -> None:
    scheme = SCHEMES[name]
    plan = analyse(model(), scheme)
    assert scheme.linears is not None
    up, down = ((scheme.linears.scheme, group) for group in CHOSEN[name])
    layers = {f"layers.{i}.{n}": g for i in range(2) for n, g in (("up", up), ("down", down))}
    assert choices(plan) == {"embed": ("int8", 64), **layers, "head": ("int8", 64)}
    assert plan.scheme == name
    activation = {"w8a8": "int8", "fp8": "fp8"}.get(name, "none")
    assert {plan.grid(name).activation for name in layers} == {activation}  # type: ignore[union-attr]
    assert plan.weights["head"] == Choice(Grid("int8", 128), "head or embedding", 64, is_wide=True)


def test_a_projection_that_is_as_wide_as_the_logits_is_no_head() -> None:
    program = model()
    for node in program.nodes:
        if is_op(node, linear) and str(node.args[1]) == "head":
            node.meta["where"] = "layers.1.mlp"
    assert choices(analyse(program, SCHEMES["int4"]))["head"] == ("int4", 32)


@pytest.mark.parametrize(
    ("group", "sizes"), [(256, (64, 16)), (128, (64, 16)), (32, (32, 16)), (16, (16, 16)), ("channel", (192, 48))]
)
def test_groups_are_as_large_as_divides_the_inputs(group: int | str, sizes: tuple[int, int]) -> None:
    found = choices(analyse(model(), make_scheme("one", Grid("int8", group))))
    assert (found["layers.0.up"], found["layers.0.down"]) == tuple(("int8", size) for size in sizes)


def test_a_small_model_has_smaller_groups() -> None:
    layers = 2 * 2 * WIDTH * INNER
    int4, int8 = (replace(SCHEMES[name], small_below=layers + 1) for name in ("int4", "int8"))
    assert analyse(model(), int4).grid("layers.0.up") == Grid("int4", 32, symmetric=False)
    assert analyse(model(), int8).grid("layers.0.up") == Grid("int8", 128)
    larger = replace(int4, small_below=layers)
    assert analyse(model(), larger).grid("layers.0.up") == Grid("int4", 128)


def test_one_scale_for_all_there_is() -> None:
    assert choices(analyse(model(), make_scheme("one", Grid("fp8", "tensor"))))["layers.0.up"] == ("fp8", 0)


def test_groups_of_exactly_so_many_are_refused_where_they_do_not_divide() -> None:
    with pytest.raises(LlmcError, match=r"48 inputs of layers.0.down.*groups of 32.*16") as caught:
        analyse(model(), make_scheme("one", Grid("int4", 32)), exact=True)
    assert caught.value.code == "GROUP_SIZE_INDIVISIBLE"
    assert choices(analyse(model(), make_scheme("one", Grid("int4", 16)), exact=True))["layers.0.down"] == ("int4", 16)


# Exceptions ---------------------------------------------------------------------------------------------------------


def test_the_last_override_that_fits_counts() -> None:
    overrides = [
        Override("layers.*", None),
        Override("*.down", Grid("int4", 16)),
        Override("layers.1.*", Grid("int8")),
        Override("head", Grid("int4", 32, activation="int8")),
    ]
    plan = analyse(model(), SCHEMES["nf4"], overrides)
    assert choices(plan) == {
        "embed": ("int8", 64),
        "layers.0.up": None,
        "layers.0.down": ("int4", 16),
        "layers.1.up": ("int8", WIDTH),
        "layers.1.down": ("int8", INNER),
        "head": ("int4", 32),
    }
    assert plan.weights["layers.0.up"].why == "override layers.*"
    assert plan.grid("head") == Grid("int4", 32), "the head processes one token"


def test_an_override_that_fits_nothing_was_meant_for_something() -> None:
    with pytest.raises(LlmcError, match=r"layer\.\*.*embed, layers\.0\.up") as caught:
        analyse(model(), SCHEMES["int8"], [Override("layer.*", None)])
    assert caught.value.code == "RECIPE_UNUSED"


def test_a_plan_in_which_some_weights_become_something_else() -> None:
    plan = analyse(model(), make_scheme("one", Grid("int4", 128)))
    raised = plan.with_grid(["layers.0.down"], Grid("int8", 64), {"layers.0.down": INNER}, "it is sensitive")
    assert raised.weights["layers.0.down"] == Choice(Grid("int8", 64), "it is sensitive", 16)
    assert plan.grid("layers.0.down") == Grid("int4", 128)
    assert {n: c for n, c in raised.weights.items() if c != plan.weights[n]}.keys() == {"layers.0.down"}


def test_weights_that_the_plan_does_not_know_have_no_grid() -> None:
    assert QuantizationPlan("none", {}).grid("head") is None


# What stays ---------------------------------------------------------------------------------------------------------


def added(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    return linear(x, m.head) + m.head.sum()


def looked_up_by_position(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    return linear(x + embedding(positions, m.places), m.head)


def odd(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    return linear(linear(x[..., :12], m.odd), m.head)


LEFT: dict[str, tuple[Any, str, str]] = {
    "something else reads it": (added, "head", "reads it too"),
    "learned positions": (looked_up_by_position, "places", "by something else than tokens"),
    "inputs that no group divides": (odd, "odd", "12 inputs don't divide"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_has_a_reason(name: str) -> None:
    compute, weight, reason = LEFT[name]
    choice = analyse(model(compute), SCHEMES["int8"]).weights[weight]
    assert choice.grid is None and reason in choice.why and choice.not_as_stored is None


def multiplied(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    return x @ m.head.T


@pytest.mark.parametrize(
    ("compute", "weight", "reason"),
    [
        (added, "head", "reads it too"),
        (looked_up_by_position, "places", "by something else than tokens"),
        (multiplied, "head", "neither a linear nor an embedding reads it"),
    ],
    ids=["something else reads it", "learned positions", "another op reads it"],
)
@pytest.mark.parametrize("scheme", [STORED, SCHEMES["int8"]], ids=lambda scheme: scheme.name)
def test_codes_that_are_lost_with_a_weight_that_stays_are_reported(
    compute: Any, weight: str, reason: str, scheme: Scheme
) -> None:
    program = model(compute)
    outputs, inputs = program.weights[weight].shape
    scales = parameter(torch.rand(outputs, inputs // 16), "scales")
    codes = constant(torch.ones(outputs, inputs, dtype=torch.int8), "codes")
    held = StoredCodes(codes, scales, None, "int8", 16)
    for value, wanted in ((held, reason), (OnlyNumbers(held, "of its format"), "of its format")):
        program.weights[weight] = value
        choice = analyse(program, scheme).weights[weight]
        assert choice.grid is None and wanted in (choice.not_as_stored or "")


def test_tables_of_the_architecture_are_not_in_the_plan() -> None:
    plan = analyse(model(lambda m, x, p: linear(linear(x, m.head) * 0 + 1, m.table.T)), SCHEMES["int8"])
    assert set(plan.weights) == {"embed", "head"}


# Codes of a checkpoint ----------------------------------------------------------------------------------------------


def stored(group: int, scheme: str = "int8", zeros: bool = False) -> StoredCodes:
    """`layers.0.up` as a checkpoint holds it."""
    width = WIDTH // (2 if scheme == "int4" else 1)
    dtype = torch.uint8 if scheme == "int4" else torch.int8
    points = constant(torch.ones(INNER, WIDTH // group, dtype=dtype), "zeros") if zeros else None
    codes = constant(torch.ones(INNER, width, dtype=dtype), "codes")
    return StoredCodes(codes, parameter(torch.rand(INNER, WIDTH // group), "scales"), points, scheme, group)


@pytest.mark.parametrize(
    ("given", "grid"),
    [
        (stored(WIDTH), Grid("int8", "channel")),
        (stored(32), Grid("int8", 32)),
        (stored(64, zeros=True), Grid("int8", 64, symmetric=False)),
        (stored(64, "int4"), Grid("int4", 64)),
        (stored(16, "int4", zeros=True), Grid("int4", 16, symmetric=False)),
    ],
)
def test_a_checkpoints_codes_are_kept(given: StoredCodes, grid: Grid) -> None:
    program = model()
    program.weights["layers.0.up"] = given
    for scheme in (SCHEMES["fp8"], make_scheme("none", None, None)):
        choice = analyse(program, scheme).weights["layers.0.up"]
        assert choice == Choice(grid, "the checkpoint has it so", given.group_size, is_stored=True)


@pytest.mark.parametrize("given", [stored(24), stored(WIDTH, "int4")])
def test_groups_that_no_grid_has_are_quantized_again(given: StoredCodes) -> None:
    program = model()
    program.weights["layers.0.up"] = given
    choice = analyse(program, SCHEMES["int8"]).weights["layers.0.up"]
    assert (choice.grid, choice.is_stored) == (Grid("int8", 128), False)


def test_int8_with_zero_points_is_only_read() -> None:
    with pytest.raises(LlmcError, match="SCHEME_INVALID"):
        analyse(model(), make_scheme("odd", Grid("int8", symmetric=False)))
