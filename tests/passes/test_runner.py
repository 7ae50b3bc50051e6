"""A runner runs lists of passes in order; its fuel, dump and log span all lists and all graphs of a compilation."""

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
from llmc.errors import CompilerError, LlmcError, UsageError
from llmc.ir.printer import from_python
from llmc.ir.program import Miss, Program
from llmc.ir.stages import Stage, verify
from llmc.passes.base import Fuel, Pass, PassResult, Reach, Rewrite, miss
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.cache.select_logits import SelectLogits
from llmc.passes.match.fold_constants import FoldConstants
from llmc.passes.match.match_linear import MatchLinear
from llmc.passes.match.match_rope import MatchRope
from llmc.passes.match.precompute_positions import PrecomputePositions
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.match.unify_op_names import UnifyOpNames
from llmc.passes.optimize.merge_qkv import MergeQkv
from llmc.passes.pipeline import PIPELINE, caching_passes
from llmc.passes.quantize.quantization_plan import QuantizationPlan
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.quantize_activations import QuantizeActivations
from llmc.passes.runner import PassRun, Runner, check_order

QUANTIZE = Quantize(QuantizationPlan("none", {}))
ALL = [*PIPELINE, *caching_passes(), FuseAttention(8)]


@functools.cache
def captured() -> Program:
    return trace(tiny_model("llama"), {}, "llama", 32)


@functools.cache
def optimized() -> Program:
    return Runner().run(captured().copy(), PIPELINE)


def eager(sample: tuple[Tensor, Tensor]) -> Tensor:
    tokens, positions = sample
    with torch.no_grad():
        return tiny_model("llama")(input_ids=tokens, position_ids=positions, use_cache=False).logits


class Hesitates(Rewrite):
    """Nearly matches every call."""

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        return miss("not today", node)


class CountUp(Rewrite):
    """Matches every `llmc.linear` and changes nothing."""

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        return True if "linear" in str(node.target) else None


# Order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ([Reach(Stage.OPTIMIZED), FuseAttention(8), InsertKvCache()], "FuseAttention comes before InsertKvCache"),
        ([Reach(Stage.CANONICAL), InsertKvCache()], "InsertKvCache needs a program that is optimized"),
        ([Reach(Stage.OPTIMIZED), InsertKvCache(), QUANTIZE], "Quantize leads back from cached"),
        ([Reach(Stage.OPTIMIZED), InsertKvCache(), InsertKvCache()], "InsertKvCache leads back from cached"),
        ([Reach(Stage.OPTIMIZED), QUANTIZE, SelectLogits()], "SelectLogits needs a program that is cached"),
        ([MatchRope(), PrecomputePositions()], "MatchRope comes before PrecomputePositions"),
        ([MatchRope()], "MatchRope comes before PrecomputePositions"),
        ([RemoveNoOps(), MatchLinear(), FoldConstants()], "MatchLinear comes before FoldConstants"),
        ([MergeQkv(), Reach(Stage.CANONICAL)], "MergeQkv needs a program that is canonical"),
        ([Reach(Stage.CANONICAL), Reach(Stage.CAPTURED)], "Reach(captured) leads back"),
    ],
)
def test_a_wrong_order_is_refused(passes: list[Pass], words: str) -> None:
    with pytest.raises(CompilerError, match=re.escape(words)) as caught:
        check_order(passes)
    assert caught.value.code == "PASS_ORDER"


def test_orders_that_hold() -> None:
    check_order([*PIPELINE, QUANTIZE, InsertKvCache(), SelectLogits(), FuseAttention(8), QuantizeActivations()])
    check_order([PrecomputePositions(), RemoveNoOps(), MatchRope(), Reach(Stage.CANONICAL), MergeQkv()])


def test_a_list_may_rely_on_passes_that_the_program_has_seen() -> None:
    check_order(caching_passes(), optimized())
    with pytest.raises(LlmcError, match="SelectLogits needs a program that is cached"):
        check_order([SelectLogits()], optimized())
    with pytest.raises(LlmcError, match=r"Reach\(canonical\) leads back from optimized"):
        check_order([Reach(Stage.CANONICAL)], optimized())


def test_a_list_in_a_wrong_order_changes_nothing(tmp_path: Path) -> None:
    program, runner = captured().copy(), Runner(dump=tmp_path)
    with pytest.raises(LlmcError, match="FuseAttention comes before InsertKvCache"):
        runner.run(program, [*PIPELINE, FuseAttention(8), InsertKvCache()])
    assert program.history == [] == runner.log and not list(tmp_path.iterdir())


# One list -----------------------------------------------------------------------------------------------------------


def test_a_list_is_run_from_its_first_to_its_last(tmp_path: Path) -> None:
    program = captured().copy()
    seen: list[tuple[str, int]] = []
    runner = Runner(dump=tmp_path, watch=lambda subject, result: seen.append((subject.name, result.matches)))
    assert runner.run(program, ALL) is program
    assert program.stage is Stage.CACHED
    assert [name for name, _ in seen] == [p.name for p in ALL] == [record.name for record in program.history]
    assert seen == [(record.name, record.matches) for record in program.history] and dict(seen)["MatchRope"] == 4
    assert [record.matches for record in program.history[-4:]] == [2, 1, 1, 2]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[0] == "00_captured.py" and files[-1] == f"{len(ALL):02d}_FuseAttention.py"

    tokens, positions = inputs(2, 9)
    caches = [cache + 1e3 for cache in program.empty_caches(2)]
    want = eager((tokens, positions))

    def call(part: Tensor, start: int, wanted: list[int]) -> list[Tensor]:
        roles = {"tokens": part, "starts": torch.tensor([start, start]), "wanted": torch.tensor(wanted)}
        return list(program.run(*program.arguments(roles, caches)))

    _, *caches = call(tokens[:, :4], 0, [-1])
    logits, *caches = call(tokens[:, 4:], 4, [-1, 1])
    torch.testing.assert_close(logits, want[:, [-1, 5]], atol=1e-5, rtol=0)


def test_it_stops_before_the_pass_after_a_stage() -> None:
    runner = Runner()
    program = runner.run(captured().copy(), ALL, until=Stage.CANONICAL)
    assert program.stage is Stage.CANONICAL and runner.log[-1].record.name == "Reach(canonical)"
    assert runner.run(program, [Hesitates()], until=Stage.CANONICAL) is program
    assert runner.log[-1].record.name == "Reach(canonical)", "the stage is reached already"


# Log ----------------------------------------------------------------------------------------------------------------


def test_the_log_has_each_pass_with_its_graph_and_misses() -> None:
    runner, program = Runner(), optimized().copy()
    runner.run(program, [Hesitates()])
    graphs = {name: runner.run(program.copy(), [CountUp(), Hesitates()], graph=name) for name in ("step", "prefill")}
    assert [(run.graph, run.record.name) for run in runner.log] == [
        ("", "Hesitates"),
        ("step", "CountUp"),
        ("step", "Hesitates"),
        ("prefill", "CountUp"),
        ("prefill", "Hesitates"),
    ]
    assert runner.log[0] == PassRun("", program.history[-1])
    assert [run.record for run in runner.log if run.graph == "step"] == graphs["step"].history[-2:]
    first = runner.log[0].record
    assert first.matches == 0 and first.misses and str(first.misses[0]).endswith("not today")
    assert runner.log[1].record.matches == program.ops()["llmc.linear"] > 0 and not runner.log[1].record.misses


# Fuel ---------------------------------------------------------------------------------------------------------------


def test_fuel_spans_all_lists_and_graphs() -> None:
    program = optimized().copy()
    linears = program.ops()["llmc.linear"]
    runner = Runner(fuel=Fuel(2 * linears + 3))
    runner.run(program, [CountUp()])
    for graph in ("step", "prefill"):
        runner.run(program.copy(), [CountUp(), CountUp()], graph=graph)
    assert [run.record.matches for run in runner.log] == [linears, linears, 3, 0, 0]
    assert runner.fuel.empty


def test_fuel_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FUEL", "2")
    runner, program = Runner(), optimized().copy()
    monkeypatch.setenv("LLMC_FUEL", "9")  # read once, when the compilation begins
    for _ in range(2):
        runner.run(program, [CountUp()])
    assert [run.record.matches for run in runner.log] == [2, 0]


def test_a_branch_goes_on_with_the_fuel_that_is_left() -> None:
    """Each trial has what the common passes left, and takes nothing from the others."""
    seen: list[str] = []
    runner = Runner(fuel=Fuel(5), watch=lambda subject, result: seen.append(subject.name))
    program = optimized().copy()
    runner.run(program, [Hesitates()])
    runner.fuel.burn()
    for _ in range(2):
        trial = runner.branch()
        trial.run(program.copy(), [CountUp()], graph="step")
        assert [(run.graph, run.record.name, run.record.matches) for run in trial.log] == [
            ("", "Hesitates", 0),
            ("step", "CountUp", 4),
        ]
        assert trial.fuel.empty and trial.fuel.amount == 5
    assert runner.fuel.left == 4 and [run.record.name for run in runner.log] == ["Hesitates"]
    assert seen == ["Hesitates", "CountUp", "CountUp"]


@pytest.mark.parametrize(
    ("passes", "name"),
    [(PIPELINE, "Reach(canonical)"), ([*PIPELINE[:-1], Reach(Stage.OPTIMIZED), *caching_passes()], "Reach(canonical)")],
    ids=["optimized", "cached"],
)
def test_fuel_that_a_required_stage_does_not_get_is_too_low(passes: list[Pass], name: str) -> None:
    program, runner = captured().copy(), Runner(fuel=Fuel(1))
    with pytest.raises(UsageError, match=re.escape(name)) as caught:
        runner.run(program, passes)
    assert caught.value.code == "FUEL_TOO_LOW"
    assert "LLMC_FUEL=1 " in caught.value.what and "not canonical yet" in caught.value.what
    assert program.stage is Stage.CAPTURED and sum(run.record.matches for run in runner.log) == 1


class Breaks(Pass):
    """Leaves a program that the verifier refuses."""

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        program.weights.clear()
        return PassResult(0)


def test_a_pass_that_fails_without_fuel_relies_on_rewrites_before_it() -> None:
    with pytest.raises(UsageError, match="the rewrites that Breaks relies on: After Breaks: ") as caught:
        Runner(fuel=Fuel(1)).run(optimized().copy(), [CountUp(), Breaks()])
    assert caught.value.code == "FUEL_TOO_LOW" and "LLMC_FUEL=1 " in caught.value.what


@pytest.mark.parametrize("fuel", [Fuel(), Fuel(1000)], ids=["unlimited", "enough"])
def test_a_pass_that_fails_although_there_is_fuel_is_at_fault(fuel: Fuel) -> None:
    with pytest.raises(CompilerError, match="After Breaks") as caught:
        Runner(fuel=fuel).run(optimized().copy(), [CountUp(), Breaks()])
    assert caught.value.code == "IR_INVALID"


def test_with_a_wanted_stage_low_fuel_stops_at_the_last_stage() -> None:
    runner = Runner(fuel=Fuel(1))
    program = runner.run(captured().copy(), PIPELINE, until=Stage.OPTIMIZED)
    assert program.stage is Stage.CAPTURED and sum(run.record.matches for run in runner.log) == 1
    verify(program)
    torch.testing.assert_close(program(*inputs(2, 9)), eager(inputs(2, 9)), atol=1e-5, rtol=0)


# Dumps --------------------------------------------------------------------------------------------------------------


def test_dumps_are_numbered_python_with_a_report(tmp_path: Path) -> None:
    passes = [UnifyOpNames(), Hesitates(), *PIPELINE[1:]]
    program = Runner(dump=tmp_path / "ir").run(captured().copy(), passes)
    files = sorted((tmp_path / "ir").iterdir())
    assert [path.name for path in files[:4]] == [
        "00_captured.py",
        "01_UnifyOpNames.py",
        "02_Hesitates.py",
        "03_RemoveNoOps.py",
    ]
    assert files[-1].name == f"{len(passes):02d}_Reach_optimized.py"
    assert len(files) == len(passes) + 1
    first, hesitated = files[0].read_text(), files[2].read_text()
    assert first.startswith("# captured\n# llama\n# llama, captured\ndef forward(")
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


def test_numbering_goes_on_over_lists_graphs_and_branches(tmp_path: Path) -> None:
    runner, program = Runner(dump=tmp_path), captured().copy()
    runner.run(program, PIPELINE[:2])
    runner.run(program, PIPELINE[2:3])
    trial = runner.branch()
    for graph in ("step", "prefill"):
        trial.run(program.copy(), [Hesitates()], graph=graph)
    trial.run(program, [CountUp()])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00_captured.py",
        "01_UnifyOpNames.py",
        "02_RemoveNoOps.py",
        "03_FoldConstants.py",
        "04_step_Hesitates.py",
        "05_prefill_Hesitates.py",
        "06_CountUp.py",
    ]
    assert (tmp_path / "05_prefill_Hesitates.py").read_text().startswith("# prefill Hesitates\n# 0 matches, ")


def test_without_a_dump_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Runner().run(captured().copy(), PIPELINE[:2])
    assert not list(tmp_path.iterdir())
