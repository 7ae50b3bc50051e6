"""Finding the faulty pass: the first that changes the numbers without being meant to, and in which graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_pass import inputs
from torch import fx
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.gate.bisect import FaultyPass, Recipe, find_faulty_pass
from llmc.compiler.targets.ort.target import TARGET
from llmc.compiler.targets.registry import make_config
from llmc.ir.program import Miss, Program
from llmc.ir.stages import Stage
from llmc.ir.weights import fold
from llmc.kernels.ops import cached_attention, fused_attention, quant_cached_attention, quant_linear
from llmc.passes.base import Fuel, Pass, PassResult
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.cache.hoist_logit_selection import HoistLogitSelection
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.optimize.drop_layers import DropLayers
from llmc.passes.optimize.unmerge_linears import UnmergeLinears
from llmc.passes.pipeline import caching_passes, optimizing_passes
from llmc.passes.quantize.quantization_plan import analyse
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.quantize_activations import QuantizeActivations, QuantizeInKernels
from llmc.passes.queries import is_call, is_op
from llmc.passes.runner import Runner
from llmc.runtimes.engines.selfcheck import limits_key

TOKENS = inputs(2, 9)[0]


class Break(Pass):
    """A miscompile."""

    def __init__(self, factor: float = -1.0) -> None:
        self.factor = factor

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        name = next(name for name, w in program.weights.items() if "down_proj" in name and w.dtype == torch.float32)
        program.weights[name] = fold(program.weights[name], self.factor)
        return PassResult(1)


@functools.cache
def program_at(stage: Stage) -> Program:
    return llmc.capture(tiny_model("llama"), until=stage)


def captured() -> Program:
    return program_at(Stage.CAPTURED).copy()


def recipe(**options: Any) -> tuple[Recipe, str]:
    """The passes of a compilation with these options, and the key of the gate's limits."""
    config = make_config(**options)
    scheme = TARGET.scheme(config)
    plan = None if scheme is None else analyse(program_at(Stage.OPTIMIZED), scheme)
    quantizing = [] if plan is None else [Quantize(plan)]
    common = [*optimizing_passes(), *quantizing, *caching_passes(cache_codes=config.cache_codes)]
    key = limits_key(config.quantize or "fp32", False, config.cache_codes)
    return Recipe(common, TARGET.finishing_passes(config, plan, ())), key


def found_in(made: tuple[Recipe, str]) -> FaultyPass | None:
    return find_faulty_pass(captured(), made[0], TOKENS, made[1])


def assert_found(made: tuple[Recipe, str], name: str, graph: str) -> FaultyPass:
    found = found_in(made)
    assert found is not None and (found.name, found.graph) == (name, graph), found
    return found


# A recipe without a fault ---------------------------------------------------------------------------------------------

SOUND: dict[str, dict[str, Any]] = {
    "as it is": {},
    "standard": {"ops": "standard"},
    "int4": {"quantize": "int4"},
    "w8a8": {"quantize": "w8a8"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "int4 and fp8 cache": {"quantize": "int4", "kv_cache_dtype": "fp8"},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_recipe_has_no_faulty_pass(name: str) -> None:
    assert found_in(recipe(**SOUND[name])) is None


def test_layers_that_are_dropped_on_purpose_are_no_fault() -> None:
    passes = optimizing_passes(["model.layers.0"])
    assert sum(isinstance(subject, DropLayers) for subject in passes) == 1
    assert found_in((Recipe(passes, {}), "pruned fp32")) is None
    place = next(i for i, subject in enumerate(passes) if isinstance(subject, DropLayers))
    for at in (place, place + 1, len(passes)):
        broken = Recipe([*passes[:at], Break(), *passes[at:]], {})
        assert_found((broken, "pruned fp32"), "Break", "")


# Faults in the passes of one graph ------------------------------------------------------------------------------------


def then(damage: Callable[[Program, fx.Node], None]) -> Callable[[Any], Any]:
    """Return a wrapper of `rewrite` that damages each quantized linear that a successful rewrite has made."""

    def wrap(honest: Callable[[Pass, Program, fx.Node], bool | Miss | None]) -> Any:
        def rewrite(self: Pass, program: Program, node: fx.Node) -> bool | Miss | None:
            before = {*program.graph.nodes}
            outcome = honest(self, program, node)
            if outcome is True:
                for made in program.nodes:
                    if made not in before and is_op(made, quant_linear):
                        damage(program, made)
            return outcome

        return rewrite

    return wrap


def negate(program: Program, node: fx.Node) -> None:
    """The result of a call with the wrong sign."""
    users = list(node.users)
    with program.graph.inserting_after(node):
        wrong = program.call(torch.ops.aten.neg.default, node, like=node)
    for user in users:
        user.replace_input_with(node, wrong)


# Pass, options with which it has something to do, and the graph that it is for.
FINISHING: dict[str, tuple[type[Pass], dict[str, Any], str]] = {
    "QuantizeActivations": (QuantizeActivations, {"quantize": "int4"}, "prefill"),
    "UnmergeLinears": (UnmergeLinears, {"quantize": "int4"}, "prefill"),
    "QuantizeInKernels": (QuantizeInKernels, {"quantize": "w8a8"}, "step"),
}


@pytest.mark.parametrize("name", FINISHING)
def test_a_fault_in_a_pass_of_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, graph = FINISHING[name]
    monkeypatch.setattr(kind, "rewrite", then(negate)(kind.rewrite))  # type: ignore[attr-defined]
    found = assert_found(recipe(**options), name, graph)
    assert found.error > 0.3
    assert str(found).startswith(f"{name} of the {graph} graph is the first pass to change the result (error ")


def test_parts_of_a_linear_that_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values, and gate and up, have the same shape: the verifier can't tell them apart."""
    honest = UnmergeLinears.rewrite

    def rewrite(self: UnmergeLinears, program: Program, node: fx.Node) -> bool | Miss | None:
        for split in (user for user in node.users if is_call(user, "split_with_sizes")):
            parts = {user.args[1]: user for user in split.users}
            last, other = parts[len(parts) - 1], parts[len(parts) - 2]
            last.args, other.args = other.args, last.args
        return honest(self, program, node)

    monkeypatch.setattr(UnmergeLinears, "rewrite", rewrite)
    assert_found(recipe(quantize="int4"), "UnmergeLinears", "prefill")


@pytest.mark.parametrize("graph", ["step", "prefill"])
def test_a_pass_that_is_faulty_in_one_of_two_graphs(graph: str) -> None:
    made, key = recipe(quantize="int4")
    assert list(made.finishing) == ["step", "prefill"]
    passes = made.finishing[graph]
    broken = Recipe(made.common, {**made.finishing, graph: [*passes, Break()]})
    assert_found((broken, key), "Break", graph)


def test_the_first_graph_is_named_if_both_have_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FuseAttention.run

    def run(self: FuseAttention, program: Program, fuel: Fuel) -> PassResult:
        result = honest(self, program, fuel)
        Break().run(program, fuel)
        return result

    monkeypatch.setattr(FuseAttention, "run", run)
    assert_found(recipe(quantize="int4"), "FuseAttention", "step")


def test_the_place_is_the_first_module_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    made, key = recipe()
    found = assert_found((Recipe([*made.common, Break()], {}), key), "Break", "")
    assert found.place == "model.layers.0.mlp.down_proj"
    assert str(found).startswith("Break is the first pass to change the result (error ")
    assert str(found).endswith(", first in model.layers.0.mlp.down_proj")


def test_numbers_that_are_not_finite_are_a_fault() -> None:
    made, key = recipe(quantize="int4")
    found = assert_found((Recipe([*made.common, Break(float("nan"))], {}), key), "Break", "")
    assert found.error != found.error


# Faults that only a filled cache shows --------------------------------------------------------------------------------


def attentions(program: Program) -> list[fx.Node]:
    kinds = (cached_attention, quant_cached_attention, fused_attention)
    return [node for node in program.nodes if any(is_op(node, kind) for kind in kinds)]


def double_starts(program: Program) -> None:
    """Attention takes the cache for twice as long as it is. A first call starts at 0, and twice 0 is 0."""
    for node in attentions(program):
        with program.graph.inserting_before(node):
            wrong = program.call(torch.ops.aten.mul.Tensor, program.starts, 2, like=node)
        node.replace_input_with(program.starts, wrong)


def forget_starts(program: Program) -> None:
    """Positions of rotary embeddings begin with 0 in each call."""
    (positions,) = (node for node in program.starts.users if node.target is torch.ops.aten.unsqueeze.default)
    with program.graph.inserting_after(positions):
        wrong = program.call(torch.ops.aten.mul.Tensor, positions, 0, like=positions)
    for user in [user for user in positions.users if user is not wrong]:
        user.replace_input_with(positions, wrong)


def attend_before_starts(program: Program) -> None:
    """Each call writes its keys and values where the first call wrote its own."""
    for node in attentions(program):
        with program.graph.inserting_before(node):
            wrong = program.call(torch.ops.aten.mul.Tensor, program.starts, 0, like=node)
        node.replace_input_with(program.starts, wrong)


def whole(program: Program) -> torch.Tensor:
    """Logits of all tokens in one call."""
    batch, length = TOKENS.shape
    starts, wanted = torch.zeros(batch, dtype=torch.int64), torch.arange(length)
    roles = {"tokens": TOKENS, "starts": starts, "wanted": wanted}
    return program(*program.arguments(roles, program.empty_caches(batch)))


@pytest.mark.parametrize("damage", [double_starts, forget_starts, attend_before_starts])
@pytest.mark.parametrize("codes", ["auto", "int8"])
def test_a_wrong_use_of_starts(damage: Callable[[Program], None], codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(kv_cache_dtype=codes)
    sound = whole(Runner().run(captured(), made[0].common))
    plant(monkeypatch, InsertKvCache, damage)
    assert torch.equal(whole(Runner().run(captured(), made[0].common)), sound), "a single call shows it"
    found = assert_found(made, "InsertKvCache", "")
    assert found.error > 0.1


def test_a_wrong_use_of_starts_in_a_pass_after_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, HoistLogitSelection, double_starts)
    assert_found(recipe(), "HoistLogitSelection", "")


def test_a_wrong_use_of_starts_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, QuantizeInKernels, double_starts)
    assert_found(recipe(quantize="w8a8"), "QuantizeInKernels", "step")


def plant(monkeypatch: pytest.MonkeyPatch, kind: type[Pass], damage: Callable[[Program], None]) -> None:
    """Let each run of a pass end with some damage."""
    honest = kind.run

    def run(self: Pass, program: Program, fuel: Fuel) -> PassResult:
        result = honest(self, program, fuel)
        damage(program)
        return result

    monkeypatch.setattr(kind, "run", run)


# Fuel -----------------------------------------------------------------------------------------------------------------


def test_fuel_is_that_of_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With LLMC_FUEL one finds the rewrite: the fault is there exactly if there is fuel for it."""
    made = recipe(quantize="int4")
    fuel = Fuel(100_000)
    program = Runner(fuel=fuel).run(captured(), made[0].common)
    for graph, passes in made[0].finishing.items():
        if graph == "step":
            Runner(fuel=fuel).run(program.copy(), passes)
    Runner(fuel=fuel).run(program.copy(), made[0].finishing["prefill"][:1])
    spent = 100_000 - int(fuel.left)
    monkeypatch.setattr(QuantizeActivations, "rewrite", then(negate)(QuantizeActivations.rewrite))
    monkeypatch.setenv("LLMC_FUEL", str(spent))
    assert found_in(made) is None
    monkeypatch.setenv("LLMC_FUEL", str(spent + 10))
    assert_found(made, "QuantizeActivations", "prefill")
