"""Stream runs a program on many sequences, with the same results as the program."""

from __future__ import annotations

import math

import pytest
import torch
from check_pass import inputs
from torch import Tensor, fx
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.compress.stream import Stream
from llmc.errors import LlmcError
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import constant
from llmc.kernels.ops import linear
from llmc.passes.queries import is_op


@pytest.fixture(scope="module")
def program() -> Program:
    return llmc.capture(tiny_model("llama"), until=Stage.OPTIMIZED)


def inputs_of_linears(program: Program, tokens: Tensor, **options: int) -> dict[fx.Node, Tensor]:
    """Return the input of each linear, over all batches."""
    seen: dict[fx.Node, Tensor] = {}
    stream = Stream(program, tokens, **options)

    def before(node: fx.Node) -> None:
        if is_op(node, linear):
            seen[node] = torch.cat(stream.inputs(node.args[0]))  # type: ignore[arg-type]

    stream.run(before)
    return seen


def test_batch_size_does_not_change_values(program: Program) -> None:
    tokens = inputs(5, 12)[0]
    one_batch = inputs_of_linears(program, tokens)
    assert len(Stream(program, tokens, batch_tokens=24).values) == 3
    for node, value in inputs_of_linears(program, tokens, batch_tokens=24).items():
        torch.testing.assert_close(value, one_batch[node])


def test_equals_the_program(program: Program) -> None:
    tokens, positions = inputs(3, 10)
    hidden: list[Tensor] = []
    stream = Stream(program, tokens)
    head = program.output
    stream.run(lambda node: hidden.extend(stream.inputs(head.args[0])) if node is head else None)  # type: ignore[arg-type,func-returns-value]
    weight = program.weights[str(head.args[1].target)].evaluate()  # type: ignore[union-attr]
    torch.testing.assert_close((hidden[0] @ weight.T).view(3, 10, -1), program(tokens, positions))


def test_values_are_dropped_after_their_last_use(program: Program) -> None:
    sizes: list[int] = []
    weights: list[int] = []
    stream = Stream(program, inputs(2, 8)[0])

    def before(node: fx.Node) -> None:
        sizes.append(len(stream.values[0]))
        weights.append(len(stream.weights))

    stream.run(before)
    assert max(sizes) < 16 < len(program.nodes) / 3
    assert max(weights) <= 4  # cos and sin of rope, and the op's own weights


def test_it_stops_at_until(program: Program) -> None:
    seen: list[fx.Node] = []
    first = next(n for n in program.nodes if is_op(n, linear))
    Stream(program, inputs(1, 4)[0]).run(seen.append, until=first)
    assert seen[-1] is first and len(seen) < 10


def test_a_weight_may_be_replaced(program: Program) -> None:
    tokens = inputs(1, 4)[0]
    stream, first = Stream(program, tokens), next(n for n in program.nodes if is_op(n, linear))
    name = str(first.args[1].target)  # type: ignore[union-attr]
    (user,) = first.users
    seen: list[Tensor] = []

    def before(node: fx.Node) -> None:
        if node is first:
            stream.override_weight(name, torch.zeros(program.weights[name].shape))
        if node is user:
            seen.extend(stream.inputs(first))

    stream.run(before, until=user)
    assert not seen[0].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_values_that_are_not_finite_are_refused(program: Program, value: float) -> None:
    """GPTQ would loop forever. 1e25 is finite, but its square is not."""
    spoiled = program.copy()
    name = next(name for name in spoiled.weights if name.endswith("up_proj.weight") or "gate_up" in name)
    spoiled.weights[name] = constant(spoiled.weights[name].evaluate().float() * 0 + value, name)
    with pytest.raises(LlmcError, match="MODEL_NOT_FINITE"):
        inputs_of_linears(spoiled, inputs(2, 8)[0])
