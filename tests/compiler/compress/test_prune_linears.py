"""Pruning of whole programs: by inputs that are pruned already, once, and with zeros that rounding keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from calibrating import input_group, new_cache, uneven_program
from check_pass import inputs
from schemes import scheme as make_scheme
from torch import Tensor

from llmc.compiler.compress import prune_linears as module
from llmc.compiler.compress.calibrate import ALGORITHMS, calibrate
from llmc.compiler.compress.prune_linears import Pruned, prune
from llmc.compiler.compress.sparsity import Sparsity, wanda
from llmc.compiler.config import PRUNE_ALGORITHMS
from llmc.ir.program import Program
from llmc.ir.weights import parameter
from llmc.passes.quantize.move_scales import MoveScales
from llmc.passes.quantize.prune import Prune
from llmc.passes.quantize.quantization_plan import analyse
from llmc.passes.quantize.quantize import Quantize, round_to_nearest
from llmc.passes.quantize.schemes import Grid

HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(0.5, 4)
TOKENS = inputs(24, 30)[0]


@pytest.fixture
def program() -> Program:
    return uneven_program()


def applied(program: Program, found: Pruned) -> Program:
    made = program.copy()
    assert Prune(found.weights, found.unpruned)(made).matches == len(found.weights) > 6
    return made


def by_magnitude(program: Program, sparsity: Sparsity) -> Program:
    made = program.copy()
    names = prune(program, sparsity, "wanda", TOKENS, new_cache()).weights
    values = {name: program.weights[name].evaluate() for name in names}
    zeroed = {name: value.masked_fill(sparsity.lowest(value.abs()), 0) for name, value in values.items()}
    Prune({name: parameter(value, name) for name, value in zeroed.items()})(made)
    return made


def divergence(program: Program, other: Program, tokens: Tensor) -> float:
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    one, two = (torch.log_softmax(p(tokens, positions), -1) for p in (program, other))
    return float((one.exp() * (one - two)).sum(-1).mean())


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR])
def test_each_is_better_than_the_one_before(program: Program, sparsity: Sparsity) -> None:
    other = inputs(9, 17)[0]
    made = [by_magnitude(program, sparsity)]
    made += [applied(program, prune(program, sparsity, name, TOKENS, new_cache())) for name in ("wanda", "sparsegpt")]
    for tokens in (TOKENS, other):
        by_size, by_inputs, compensated = (divergence(program, one, tokens) for one in made)
        assert by_inputs < 0.95 * by_size and compensated < 0.95 * by_inputs


@pytest.mark.parametrize("algorithm", PRUNE_ALGORITHMS)
def test_exactly_half_of_all_but_the_head(program: Program, algorithm: str) -> None:
    before = {name: weight.key for name, weight in program.weights.items()}
    found = prune(program, TWO_OF_FOUR, algorithm, TOKENS, new_cache())
    assert {name: weight.key for name, weight in program.weights.items()} == before
    assert 2 * found.zeros == found.numbers == sum(weight.numel for weight in found.weights.values())
    for name, weight in found.weights.items():
        value = weight.evaluate()
        assert (weight.shape, weight.dtype) == (program.weights[name].shape, program.weights[name].dtype)
        assert ((value.unflatten(1, (-1, 4)) == 0).sum(2) == 2).all()
        assert not weight.is_constant
    assert list(found.unpruned) == ["lm_head.weight"]


def test_inputs_are_those_of_the_pruned_program(program: Program) -> None:
    """The first linear is pruned by the model's own values, the last by those that the other zeros lead to."""
    found = prune(program, HALF, "wanda", TOKENS, new_cache())
    first, *_, last = found.weights
    others = program.copy()
    Prune({name: weight for name, weight in found.weights.items() if name != last})(others)

    def pruned_by_hand(inputs_from: Program, name: str) -> Tensor:
        squared_norms = inputs_of(inputs_from, name).square().sum(0)
        return wanda(program.weights[name].evaluate(), squared_norms, HALF)

    assert share_of_equal(found.weights[first].evaluate(), pruned_by_hand(program, first)) > 0.999
    assert share_of_equal(found.weights[last].evaluate(), pruned_by_hand(others, last)) > 0.999
    assert share_of_equal(found.weights[last].evaluate(), pruned_by_hand(program, last)) < 0.98


def share_of_equal(one: Tensor, other: Tensor) -> float:
    return float((one == other).float().mean())


def inputs_of(program: Program, name: str) -> Tensor:
    """Run a program; return what the linear with this weight reads, [tokens, channels]."""
    (read,) = program.graph.find_nodes(op="get_attr", target=name)
    (linear,) = read.users
    seen: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
            return program.weights[target].evaluate()

        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n is linear.args[0]:
                seen.append(result.flatten(0, -2))
            return result

    with torch.no_grad():
        Watch(program.module).run(TOKENS, torch.arange(TOKENS.shape[1]).repeat(len(TOKENS), 1))
    (x,) = seen
    return x


def test_it_goes_on_where_it_was_interrupted(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    place, calls = new_cache(), 0
    whole = prune(program, HALF, "sparsegpt", TOKENS, new_cache())
    plainly = module.sparsegpt

    def interrupted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return plainly(*args)

    monkeypatch.setattr(module, "sparsegpt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(program, HALF, "sparsegpt", TOKENS, place)
    seen: list[tuple[int, int]] = []
    found = prune(program, HALF, "sparsegpt", TOKENS, place, lambda *step: seen.append(step))
    assert calls == 4 + len(whole.weights) - 3  # three were there
    for name, weight in whole.weights.items():
        assert torch.equal(found.weights[name].evaluate(), weight.evaluate())
    assert found.zeros == whole.zeros
    assert seen == [(done, len(whole.weights)) for done in range(len(whole.weights) + 1)]


GRIDS = [
    Grid("int8", 16),
    Grid("int8"),
    Grid("int4", 16),
    Grid("int4", 16, symmetric=False),
    Grid("nf4", 16),
    Grid("fp8"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_keeps_zeros(program: Program, grid: Grid) -> None:
    pruned = applied(program, prune(program, TWO_OF_FOUR, "sparsegpt", TOKENS, new_cache()))
    gone = {name: pruned.weights[name].evaluate() == 0 for name in program.weights if "proj" in name}
    plan = analyse(pruned, make_scheme("test", grid))
    for name, zeros in gone.items():
        value = round_to_nearest(pruned.weights[name], plan.weights[name]).value(plan.weights[name])
        assert (value[zeros] == 0).all() and (value[~zeros] != 0).float().mean() > 0.5
    for algorithm in ("smoothquant", "awq", "gptq"):
        found = calibrate(
            pruned, plan, ALGORITHMS[algorithm], TOKENS, new_cache(), input_group=input_group, keep_zeros=True
        )
        assert found.quantized.keys() == gone.keys()
        for name, parts in found.quantized.items():
            assert (parts.value(plan.weights[name])[gone[name]] == 0).all(), (algorithm, name)


def test_gptq_makes_good_what_it_may(program: Program) -> None:
    """Rounding a pruned program column by column is still better than each number to the nearest."""
    pruned = applied(program, prune(program, HALF, "sparsegpt", TOKENS, new_cache()))
    plan = analyse(pruned, make_scheme("test", Grid("int4", 16)))
    algorithm = replace(ALGORITHMS["gptq"], scales=None)
    found = calibrate(pruned, plan, algorithm, TOKENS, new_cache(), input_group=input_group, keep_zeros=True)
    made, plainly = pruned.copy(), pruned.copy()
    MoveScales(found.scales)(made)
    Quantize(plan, found.quantized)(made)
    Quantize(plan)(plainly)
    assert divergence(pruned, made, TOKENS) < 0.9 * divergence(pruned, plainly, TOKENS)
