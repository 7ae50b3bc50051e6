"""The life of a pass: it needs a stage, it is held to the spec, its doings are recorded, and fuel stops it."""

from __future__ import annotations

import math

import pytest
import torch
from check_pass import VOCAB, capture, inputs
from torch import Tensor, fx, nn

from llmc.errors import LlmcError
from llmc.ir.program import Miss, Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import linear
from llmc.passes.base import Fuel, Pass, PassResult, Rewrite, miss
from llmc.passes.match.match_embedding import MatchEmbedding
from llmc.passes.queries import is_call

aten = torch.ops.aten


class Model(nn.Module):
    """Three relus and a gelu in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.GELU(), nn.ReLU()])
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for act in self.acts:
            x = act(x) - 0.1
        return self.head(x)


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Model())


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


class ClampRelu(Rewrite):
    """relu as a clamp; a gelu is nearly one."""

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_call(node, "gelu"):
            return miss("it is smooth", node)
        if not is_call(node, "relu"):
            return None
        program.replace_with(node, aten.clamp_min.default, node.args[0], 0.0)
        return True


def test_a_rewrite_counts_its_matches_and_misses(program: Program) -> None:
    want = program(*inputs(2, 5))
    result = ClampRelu()(program)
    assert result == PassResult(3, [Miss("it is smooth", "gelu", "acts.2")])
    assert program.ops()["aten.clamp_min"] == 3 and not program.ops()["aten.relu"]
    assert torch.equal(program(*inputs(2, 5)), want)


def test_a_miss_says_where_and_why(program: Program) -> None:
    (found,) = ClampRelu()(program).misses
    assert str(found) == "gelu in acts.2: it is smooth"
    assert str(Miss("why", "node")) == "node: why"


def test_what_a_match_left_without_a_reader_is_not_looked_at(program: Program) -> None:
    seen: list[str] = []

    class SkipBoth(Rewrite):
        """Takes out a subtraction and what it reads."""

        def rewrite(self, program: Program, node: fx.Node) -> bool | None:
            seen.append(node.name)
            if not is_call(node, "relu"):
                return None
            (after,) = node.users
            program.replace(after, node.args[0])  # type: ignore[arg-type]
            return True

    SkipBoth()(program)
    assert not [name for name in seen if name in ("sub", "sub_1", "sub_3")]
    assert "sub_2" in seen and program.ops()["aten.sub"] == 1


def test_history_tells_what_was_done(program: Program) -> None:
    ClampRelu()(program)
    program.stage = Stage.CAPTURED
    ClampRelu()(program)
    first, second = program.history
    assert (first.name, first.matches, first.stage) == ("ClampRelu", 3, Stage.CAPTURED)
    assert [str(m) for m in first.misses] == ["gelu in acts.2: it is smooth"]
    assert second.matches == 0 and second.seconds > 0


# Fuel ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0, 1, 2, 3, 4])
def test_fuel_stops_after_exactly_so_many_matches(program: Program, amount: int) -> None:
    fuel = Fuel(amount)
    done = min(amount, 3)
    assert ClampRelu()(program, fuel).matches == done
    assert program.ops()["aten.relu"] == 3 - done
    assert fuel.empty == (amount <= 3) and fuel.left == amount - done


def test_fuel_is_shared_by_passes(captured: Program) -> None:
    fuel = Fuel(4)
    assert [ClampRelu()(captured.copy(), fuel).matches for _ in range(3)] == [3, 1, 0]


def test_without_a_limit_there_is_always_fuel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMC_FUEL", raising=False)
    for fuel in (Fuel(), Fuel.from_environment()):
        fuel.burn()
        assert fuel.left == math.inf and not fuel.empty


def test_fuel_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FUEL", "7")
    assert Fuel.from_environment().left == 7
    monkeypatch.setenv("LLMC_FUEL", "0")
    assert Fuel.from_environment().empty


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5", "²"])
def test_fuel_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LLMC_FUEL", text)
    with pytest.raises(LlmcError) as caught:
        Fuel.from_environment()
    assert caught.value.code == "FUEL_INVALID" and repr(text) in caught.value.what


# Requirements and promises ------------------------------------------------------------------------------------------


class NeedsCanonical(Pass):
    """Does nothing, late."""

    needs = Stage.CANONICAL

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        raise AssertionError("a pass runs on a program that qualifies")


def test_a_pass_refuses_a_program_that_has_not_come_far_enough(program: Program) -> None:
    with pytest.raises(
        LlmcError, match=r"NeedsCanonical needs a program that is canonical, but this one is captured"
    ) as caught:
        NeedsCanonical()(program)
    assert caught.value.code == "PASS_ORDER" and program.history == []


class Reaches(Pass):
    """Does nothing, and says how far a program has come."""

    def __init__(self, stage: Stage | None) -> None:
        self.reaches = stage

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        return PassResult(0)


def test_a_stage_is_reached_after_the_pass_that_leads_to_it(program: Program) -> None:
    MatchEmbedding()(program)
    for node in [n for n in program.nodes if is_call(n, "linear")]:
        program.replace_with(node, linear, *node.args)
    Reaches(None)(program)
    assert program.stage is Stage.CAPTURED
    Reaches(Stage.OPTIMIZED)(program)
    assert program.stage is Stage.OPTIMIZED and program.history[-1].stage is Stage.OPTIMIZED


def test_a_stage_that_was_passed_stays_passed(program: Program) -> None:
    MatchEmbedding()(program)
    for node in [n for n in program.nodes if is_call(n, "linear")]:
        program.replace_with(node, linear, *node.args)
    program.stage = Stage.CACHED
    Reaches(Stage.QUANTIZED)(program)
    assert program.stage is Stage.CACHED and program.history[-1].stage is Stage.CACHED


def test_what_comes_out_is_held_to_the_stage_that_is_reached(program: Program) -> None:
    with pytest.raises(LlmcError, match=r"After Reaches: .*canonical program.* is not allowed there"):
        Reaches(Stage.CANONICAL)(program)
    assert program.history == []


class Breaks(Pass):
    """Puts in a call that changes a tensor in place."""

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        (gelu,) = [n for n in program.nodes if is_call(n, "gelu")]
        program.replace_with(gelu, aten.relu_.default, gelu.args[0])
        return PassResult(1)


def test_a_pass_that_breaks_the_spec_is_named(program: Program) -> None:
    with pytest.raises(LlmcError, match=r"After Breaks: .*relu_") as caught:
        Breaks()(program)
    assert caught.value.code == "IR_INVALID" and "acts.2" in caught.value.what and caught.value.hint
    assert program.history == []


class LeavesDeadCode(Pass):
    """Adds a call that nothing reads, with a weight."""

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        gelu = next(n for n in program.nodes if is_call(n, "gelu"))
        weight = program.add_weight("unread", program.weights["head.bias"], like=gelu)
        with program.graph.inserting_after(gelu):
            program.call(aten.neg.default, weight, like=gelu)
        return PassResult(0)


def test_what_a_pass_leaves_unread_is_swept_away(program: Program) -> None:
    before = str(program)
    LeavesDeadCode()(program)
    assert str(program) == before and "unread" not in program.weights
