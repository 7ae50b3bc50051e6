"""PIPELINE brings a captured program to a stage, computes the same at each, and stops where fuel runs out."""

from __future__ import annotations

import functools

import pytest
import torch
from check_pass import inputs
from torch import Tensor
from zoo.tiny import tiny_model

from llmc.compiler.frontend.capture import trace
from llmc.errors import LlmcError
from llmc.ir.program import Program
from llmc.ir.stages import Stage, verify
from llmc.passes import pipeline
from llmc.passes.base import Fuel, Numerics, Pass, PassResult, Reach
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.optimize.drop_layers import DropLayers
from llmc.passes.optimize.unmerge_linears import UnmergeLinears
from llmc.passes.pipeline import PIPELINE, bring_to, caching_passes, optimizing_passes
from llmc.passes.quantize.move_scales import MoveScales
from llmc.passes.quantize.prune import Prune
from llmc.passes.quantize.quantization_plan import QuantizationPlan
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.quantize_activations import QuantizeActivations, QuantizeInKernels
from llmc.passes.runner import Runner, check_order


@functools.cache
def captured() -> Program:
    return trace(tiny_model("llama"), {}, "llama", 32)


@functools.cache
def finished() -> Program:
    return bring_to(captured().copy(), Stage.OPTIMIZED)


def eager(sample: tuple[Tensor, Tensor]) -> Tensor:
    tokens, positions = sample
    with torch.no_grad():
        return tiny_model("llama")(input_ids=tokens, position_ids=positions, use_cache=False).logits


# The lists ----------------------------------------------------------------------------------------------------------


def test_the_lists_are_in_order() -> None:
    quantize = Quantize(QuantizationPlan("none", {}))
    check_order(PIPELINE)
    check_order([*optimizing_passes(["a"]), quantize, *caching_passes(), FuseAttention(8), QuantizeActivations()])


def test_layers_are_dropped_while_the_program_is_canonical() -> None:
    names = [p.name for p in optimizing_passes(["a"])]
    assert names.index("DropLayers") == names.index("Reach(canonical)") + 1
    without = [name for name in names if name not in ("DropLayers", "CheckTokenIndependence")]
    assert without == [p.name for p in PIPELINE] and names[-1] == "CheckTokenIndependence"
    assert not any(isinstance(p, DropLayers) for p in optimizing_passes())


def test_only_passes_that_are_meant_to_change_numbers_may() -> None:
    """The gate's bisection allows each pass the error that it declares."""
    plan = QuantizationPlan("none", {})
    quantizing = [*caching_passes(cache_codes="int8")[:1], QuantizeActivations(), QuantizeInKernels()]
    for passes, numerics in (
        ([*PIPELINE, *caching_passes(), FuseAttention(8), UnmergeLinears(), MoveScales({})], Numerics.EXACT),
        (quantizing, Numerics.QUANTIZES_INPUTS),
        ([DropLayers(["a"]), Prune({}), Quantize(plan)], Numerics.LOSSY),
    ):
        assert {p.name: p.numerics for p in passes} == {p.name: numerics for p in passes}


# Stages -------------------------------------------------------------------------------------------------------------


def test_a_program_is_brought_up_to_the_end() -> None:
    program = finished()
    assert program.stage is Stage.OPTIMIZED
    verify(program)
    assert [record.name for record in program.history] == [p.name for p in PIPELINE]
    for size in ((2, 9), (1, 1), (3, 5)):
        torch.testing.assert_close(program(*inputs(*size)), eager(inputs(*size)), atol=1e-5, rtol=0)


def test_it_stops_at_the_stage_that_was_asked_for() -> None:
    program = captured().copy()
    assert bring_to(program, Stage.CAPTURED).history == []
    assert bring_to(program, Stage.CANONICAL).stage is Stage.CANONICAL
    assert program.history[-1].name == "Reach(canonical)"
    torch.testing.assert_close(program(*inputs(2, 9)), eager(inputs(2, 9)), atol=1e-5, rtol=0)


def test_it_goes_on_where_a_program_is() -> None:
    program = bring_to(captured().copy(), Stage.CANONICAL)
    done = len(program.history)
    bring_to(program, Stage.OPTIMIZED)
    names = [p.name for p in PIPELINE]
    assert [record.name for record in program.history] == names
    assert names[done - 1] == "Reach(canonical)"
    assert bring_to(program, Stage.CANONICAL).stage is Stage.OPTIMIZED, "stages only go up"


@pytest.mark.parametrize("stage", [Stage.QUANTIZED, Stage.CACHED])
def test_a_stage_that_no_pass_reaches_is_refused(stage: Stage) -> None:
    program = captured().copy()
    with pytest.raises(LlmcError, match=str(stage)) as caught:
        bring_to(program, stage)
    assert caught.value.code == "STAGE_UNREACHED" and program.history == []
    program.stage = stage
    with pytest.raises(LlmcError, match=str(stage)):
        bring_to(program, Stage.OPTIMIZED)


def test_a_stage_is_reached_only_by_a_program_that_keeps_its_promise() -> None:
    with pytest.raises(LlmcError, match=r"After Reach\(canonical\): .* is not allowed there"):
        Reach(Stage.CANONICAL)(captured().copy())


# Fuel ---------------------------------------------------------------------------------------------------------------


def total() -> int:
    return sum(record.matches for record in finished().history)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_fuel_stops_after_so_many_matches_of_all_passes(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    amount = int(share * total())
    monkeypatch.setenv("LLMC_FUEL", str(amount))
    program = bring_to(captured().copy(), Stage.OPTIMIZED)
    assert sum(record.matches for record in program.history) == amount
    assert program.stage in (Stage.CAPTURED, Stage.OPTIMIZED)
    verify(program)
    got, want = program(*inputs(2, 9)), eager(inputs(2, 9))
    torch.testing.assert_close(got, want[:, -got.shape[1] :], atol=1e-5, rtol=0)


def test_every_match_costs_one_unit_of_fuel() -> None:
    """Each pass stops within itself: with one unit less than it would burn it leaves one match out."""
    program = captured().copy()
    for subject in PIPELINE:
        twin = program.copy()
        matches = subject(program).matches
        if matches:
            assert subject(twin, Fuel(matches - 1)).matches == matches - 1, subject.name
            torch.testing.assert_close(twin(*inputs(2, 4))[:, -1:], program(*inputs(2, 4))[:, -1:], atol=1e-5, rtol=0)


def test_fuel_that_lasts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FUEL", str(total()))
    program = bring_to(captured().copy(), Stage.OPTIMIZED)
    assert str(program) == str(finished())


def test_fuel_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FUEL", "some")
    with pytest.raises(LlmcError, match="FUEL_INVALID"):
        bring_to(captured().copy(), Stage.CANONICAL)


# A runner of the caller ---------------------------------------------------------------------------------------------


def test_the_callers_runner_is_used() -> None:
    runner = Runner(fuel=Fuel(3))
    program = bring_to(captured().copy(), Stage.CANONICAL, runner)
    assert program.stage is Stage.CAPTURED and runner.fuel.empty
    assert [run.record for run in runner.log] == program.history
    assert sum(record.matches for record in program.history) == 3


def test_a_pass_that_breaks_the_spec_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Pass):
        def run(self, program: Program, fuel: Fuel) -> PassResult:
            program.weights.clear()
            return PassResult(1)

    monkeypatch.setattr(pipeline, "PIPELINE", [RemoveNoOps(), Breaks(), Reach(Stage.CANONICAL)])
    with pytest.raises(LlmcError, match="After Breaks"):
        bring_to(captured().copy(), Stage.CANONICAL)
