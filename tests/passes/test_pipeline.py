"""The one list of passes: its order is checked, its progress can be watched, dumped, and stopped by fuel."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from check_pass import inputs
from torch import Tensor, fx
from zoo.tiny import tiny_model

from llmc.compiler.frontend.capture import trace
from llmc.errors import LlmcError
from llmc.ir.printer import from_python
from llmc.ir.program import Program
from llmc.ir.stages import Stage, verify
from llmc.passes import pipeline
from llmc.passes.base import Pass, PassResult, Rewrite, miss
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.cache.hoist_logit_selection import HoistLogitSelection
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.cache.select_logits import SelectLogits
from llmc.passes.match.fold_constants import FoldConstants
from llmc.passes.match.match_linear import MatchLinear
from llmc.passes.match.match_rope import MatchRope
from llmc.passes.match.precompute_positions import PrecomputePositions
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.match.unify_op_names import UnifyOpNames
from llmc.passes.optimize.merge_qkv import MergeQkv
from llmc.passes.pipeline import PIPELINE, Dump, Reach, check_order, run_passes, run_pipeline
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.round_activations import RoundActivations
from llmc.passes.quantize.rounding_plan import RoundingPlan

ROUND = Quantize(RoundingPlan("none", {}))
TO_THE_END = [*PIPELINE, InsertKvCache(), SelectLogits(), HoistLogitSelection(), FuseAttention()]


@functools.cache
def captured() -> Program:
    return trace(tiny_model("llama"), {}, "llama", 32)


@functools.cache
def finished() -> Program:
    return run_pipeline(captured().copy(), Stage.OPTIMIZED)


def eager(sample: tuple[Tensor, Tensor]) -> Tensor:
    tokens, positions = sample
    with torch.no_grad():
        return tiny_model("llama")(input_ids=tokens, position_ids=positions, use_cache=False).logits


# Order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ([Reach(Stage.OPTIMIZED), FuseAttention(), InsertKvCache()], "FuseAttention stands before InsertKvCache"),
        ([Reach(Stage.CANONICAL), InsertKvCache()], "InsertKvCache needs a optimized program"),
        ([Reach(Stage.OPTIMIZED), InsertKvCache(), ROUND], "Quantize leads back from cached"),
        ([Reach(Stage.OPTIMIZED), InsertKvCache(), InsertKvCache()], "InsertKvCache leads back from cached"),
        ([Reach(Stage.OPTIMIZED), ROUND, SelectLogits()], "SelectLogits needs a cached program"),
        ([MatchRope(), PrecomputePositions()], "MatchRope stands before PrecomputePositions"),
        ([MatchRope()], "MatchRope stands before PrecomputePositions"),
        ([RemoveNoOps(), MatchLinear(), FoldConstants()], "MatchLinear stands before FoldConstants"),
        ([MergeQkv(), Reach(Stage.CANONICAL)], "MergeQkv needs a canonical program"),
        ([Reach(Stage.CANONICAL), Reach(Stage.CAPTURED)], "Reach(captured) leads back"),
    ],
)
def test_a_wrong_order_is_refused(passes: list[Pass], words: str) -> None:
    with pytest.raises(LlmcError, match=re.escape(words)) as caught:
        check_order(passes)
    assert caught.value.code == "PASS_ORDER"


def test_the_pipelines_order_holds() -> None:
    check_order(PIPELINE)
    check_order([*PIPELINE, ROUND, InsertKvCache(), SelectLogits(), FuseAttention(), RoundActivations()])
    check_order([PrecomputePositions(), RemoveNoOps(), MatchRope(), Reach(Stage.CANONICAL), MergeQkv()])


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
    assert run_pipeline(program, Stage.CAPTURED).history == []
    assert run_pipeline(program, Stage.CANONICAL).stage is Stage.CANONICAL
    assert program.history[-1].name == "Reach(canonical)"
    torch.testing.assert_close(program(*inputs(2, 9)), eager(inputs(2, 9)), atol=1e-5, rtol=0)


def test_it_goes_on_where_a_program_is() -> None:
    program = run_pipeline(captured().copy(), Stage.CANONICAL)
    done = len(program.history)
    run_pipeline(program, Stage.OPTIMIZED)
    names = [p.name for p in PIPELINE]
    assert [record.name for record in program.history] == names
    assert names[done - 1] == "Reach(canonical)"
    assert run_pipeline(program, Stage.CANONICAL).stage is Stage.OPTIMIZED, "stages only go up"


@pytest.mark.parametrize("stage", [Stage.QUANTIZED, Stage.CACHED, Stage.LOWERED])
def test_a_stage_that_no_pass_reaches_is_refused(stage: Stage) -> None:
    program = captured().copy()
    with pytest.raises(LlmcError, match=str(stage)) as caught:
        run_pipeline(program, stage)
    assert caught.value.code == "STAGE_UNREACHED" and program.history == []
    program.stage = stage
    with pytest.raises(LlmcError, match=str(stage)):
        run_pipeline(program, Stage.OPTIMIZED)


def test_a_stage_is_reached_only_by_a_program_that_keeps_its_promise() -> None:
    with pytest.raises(LlmcError, match=r"After Reach\(canonical\): .* is not allowed there"):
        Reach(Stage.CANONICAL)(captured().copy())


def test_each_pass_is_watched() -> None:
    seen: list[tuple[str, int]] = []
    program = run_pipeline(
        captured().copy(), Stage.CANONICAL, watch=lambda subject, result: seen.append((subject.name, result.matches))
    )
    assert seen == [(record.name, record.matches) for record in program.history]
    assert dict(seen)["MatchRope"] == 4


# A list of one's own ------------------------------------------------------------------------------------------------


def test_a_list_is_run_from_its_first_to_its_last(tmp_path: Path) -> None:
    seen: list[str] = []
    program = captured().copy()
    run_passes(program, TO_THE_END, dump=tmp_path, watch=lambda subject, result: seen.append(subject.name))
    assert program.stage is Stage.CACHED
    assert seen == [p.name for p in TO_THE_END] == [record.name for record in program.history]
    assert [record.matches for record in program.history[-4:]] == [2, 1, 1, 2]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[0] == "00_captured.py" and files[-1] == f"{len(TO_THE_END):02d}_FuseAttention.py"

    tokens, positions = inputs(2, 9)
    caches = [
        torch.full((2, cache.heads, cache.length, dim), 1e3)
        for cache in program.caches
        for dim in (cache.key_dim, cache.value_dim)
    ]
    want = eager((tokens, positions))
    _, *caches = program.run(tokens[:, :4], torch.tensor([0, 0]), torch.tensor([-1]), *caches)
    logits, *caches = program.run(tokens[:, 4:], torch.tensor([4, 4]), torch.tensor([-1, 1]), *caches)
    torch.testing.assert_close(logits, want[:, [-1, 5]], atol=1e-5, rtol=0)


def test_a_list_in_a_wrong_order_changes_nothing() -> None:
    program = captured().copy()
    with pytest.raises(LlmcError, match="FuseAttention stands before InsertKvCache"):
        run_passes(program, [*PIPELINE, FuseAttention(), InsertKvCache()])
    assert program.history == []


# Fuel ---------------------------------------------------------------------------------------------------------------


def total() -> int:
    return sum(record.matches for record in finished().history)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_fuel_stops_after_so_many_matches_of_all_passes(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    amount = int(share * total())
    monkeypatch.setenv("LLMC_FUEL", str(amount))
    program = run_pipeline(captured().copy(), Stage.OPTIMIZED)
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
            assert subject(twin, pipeline.Fuel(matches - 1)).matches == matches - 1, subject.name
            torch.testing.assert_close(twin(*inputs(2, 4))[:, -1:], program(*inputs(2, 4))[:, -1:], atol=1e-5, rtol=0)


def test_fuel_that_lasts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FUEL", str(total()))
    program = run_pipeline(captured().copy(), Stage.OPTIMIZED)
    assert str(program) == str(finished())


def test_fuel_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FUEL", "some")
    with pytest.raises(LlmcError, match="FUEL_INVALID"):
        run_pipeline(captured().copy(), Stage.CANONICAL)


# Dumps --------------------------------------------------------------------------------------------------------------


class Hesitates(Rewrite):
    """Nearly matches the first call that it sees."""

    def rewrite(self, program: Program, node: fx.Node) -> bool | None:
        return miss("not today", node)  # type: ignore[return-value]


def test_dumps_are_numbered_python_that_says_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [UnifyOpNames(), Hesitates(), *PIPELINE[1:]]
    monkeypatch.setattr(pipeline, "PIPELINE", passes)
    program = run_pipeline(captured().copy(), Stage.OPTIMIZED, dump=tmp_path / "ir")
    files = sorted((tmp_path / "ir").iterdir())
    assert [path.name for path in files[:4]] == [
        "00_captured.py",
        "01_UseOneName.py",
        "02_Hesitates.py",
        "03_RemoveNoOps.py",
    ]
    assert files[-1].name == f"{len(passes):02d}_Reach_optimized.py"
    assert len(files) == len(passes) + 1
    given, hesitated = files[0].read_text(), files[2].read_text()
    assert given.startswith("# captured\n# llama\n# llama, captured\ndef forward(")
    assert re.match(r"# Hesitates\n# 0 matches, \d+ ms\n# \w+: not today\n", hesitated)
    assert "# embedding in model.embed_tokens: not today\n" in hesitated
    assert re.match(r"# RemoveNoOps\n# [1-9]\d* matches, \d+ ms\n", files[3].read_text())

    # Each file is the program of its moment.
    want = eager(inputs(2, 5))
    values = {name: weight.evaluate() for p in (captured(), program) for name, weight in p.weights.items()}
    ran = 0
    for path in files:
        text = path.read_text()
        named = set(re.findall(r'weights\["([^"]+)"\]', text))
        if named <= set(values):  # weights that came and went are gone
            logits = from_python(text)(values, *inputs(2, 5))[0]
            torch.testing.assert_close(logits, want[:, -logits.shape[1] :], atol=1e-5, rtol=0)
            ran += 1
    assert ran > len(files) // 2


def test_a_dump_goes_on_behind_the_files_of_earlier_passes(tmp_path: Path) -> None:
    dump, program = Dump(tmp_path), captured().copy()
    run_passes(program, PIPELINE[:3], dump=dump)
    run_passes(program, PIPELINE[3:5], dump=dump)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [int(name[:2]) for name in names] == list(range(6))
    assert names[0] == "00_captured.py" and names[-1] == f"05_{PIPELINE[4].name}.py"


def test_a_pass_that_breaks_the_spec_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Pass):
        def run(self, program: Program, fuel: pipeline.Fuel) -> PassResult:
            program.weights.clear()
            return PassResult(1)

    monkeypatch.setattr(pipeline, "PIPELINE", [RemoveNoOps(), Breaks(), Reach(Stage.CANONICAL)])
    with pytest.raises(LlmcError, match="After Breaks"):
        run_pipeline(captured().copy(), Stage.CANONICAL)
