"""Estimated divergence by rounding, compared with measured divergence."""

from __future__ import annotations

import pytest
import torch
from check_pass import inputs
from torch import Tensor, fx
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.compress.sensitivity import layer_segments, sensitivity
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import parameter
from llmc.kernels.ops import linear
from llmc.kernels.ops.quantized import quantize_activation
from llmc.passes.queries import is_op

TOKENS = inputs(64, 30)[0]


@pytest.fixture(scope="module")
def program() -> Program:
    return llmc.capture(tiny_model("llama"), until=Stage.OPTIMIZED)


def noise(program: Program, size: float) -> dict[str, Tensor]:
    """Return an error for each weight of a layer, of very different sizes."""
    torch.manual_seed(0)
    names = [name for name, weight in program.weights.items() if ".layers." in name and len(weight.shape) == 2]
    assert len(names) >= 8
    return {
        name: size * 4.0 ** -(i % 4) * torch.randn(program.weights[name].shape) * program.weights[name].evaluate().std()
        for i, name in enumerate(names)
    }


def divergence(program: Program, error: dict[str, Tensor], tokens: Tensor) -> float:
    changed = program.copy()
    for name, part in error.items():
        changed.weights[name] = parameter(program.weights[name].evaluate() + part, name)
    return kld(logits(program, tokens), logits(changed, tokens))


def logits(program: Program, tokens: Tensor) -> Tensor:
    return program(tokens, torch.arange(tokens.shape[1]).repeat(len(tokens), 1))


def kld(exact: Tensor, changed: Tensor) -> float:
    own, other = (torch.log_softmax(x.double(), -1) for x in (exact, changed))
    return float((own.exp() * (own - other)).sum(-1).mean())


def rounded(x: Tensor) -> Tensor:
    codes, scale = quantize_activation(x, "int8")
    return codes * scale


def test_estimated_and_measured(program: Program) -> None:
    errors = noise(program, 0.1)
    estimated = sensitivity(program, TOKENS, {name: lambda part=part: part for name, part in errors.items()}).weights
    measured = {name: divergence(program, {name: error}, TOKENS) for name, error in errors.items()}
    for name in errors:
        assert 1 / 3 < estimated[name] / measured[name] < 3
    ranks = torch.tensor([[sorted(d.values()).index(d[name]) for name in errors] for d in (estimated, measured)])
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    assert sum(estimated.values()) == pytest.approx(divergence(program, errors, TOKENS), rel=0.4)


def test_segments_do_not_change_the_result(program: Program) -> None:
    """One segment for the whole program has the same result as one for each layer."""
    errors = {name: lambda part=part: part for name, part in noise(program, 0.1).items()}
    by_layer = sensitivity(program, TOKENS[:2], errors)
    assert len(layer_segments(program)) >= 4
    calls = [node for node in program.nodes if node.op == "call_function"]
    steps: list[tuple[int, int]] = []
    in_one = sensitivity(program, TOKENS[:2], errors, lambda *step: steps.append(step), segments=[calls])
    assert len(steps) == 2, "the last segment runs forward and backward at once, for each sequence"
    for scores, expected in ((in_one.weights, by_layer.weights), (in_one.inputs, by_layer.inputs)):
        assert scores == pytest.approx(expected, rel=1e-4) and scores.keys() == errors.keys()


def test_values_that_several_segments_use() -> None:
    """Their gradients add up: a norm is used by queries, keys and values, here in a segment each."""
    program = llmc.capture(tiny_model("llama"), until=Stage.CANONICAL)
    errors = {name: lambda part=part: part for name, part in noise(program, 0.1).items()}
    segments: list[list[fx.Node]] = [[]]
    for node in program.nodes:
        if node.op == "call_function":
            if is_op(node, linear):
                segments.append([])
            segments[-1].append(node)
    by_layer, by_linear = (
        sensitivity(program, TOKENS[:2], errors),
        sensitivity(program, TOKENS[:2], errors, segments=segments),
    )
    assert by_linear.weights == pytest.approx(by_layer.weights, rel=1e-4)
    assert by_linear.inputs == pytest.approx(by_layer.inputs, rel=1e-4)


def test_quantized_inputs_estimated_and_measured(program: Program) -> None:
    none = {name: lambda shape=program.weights[name].shape: torch.zeros(shape) for name in noise(program, 0.0)}
    estimated = sensitivity(program, TOKENS, none)
    assert not any(estimated.weights.values())
    exact = logits(program, TOKENS)
    for name, score in estimated.inputs.items():
        changed = program.copy()
        for node in changed.nodes:
            if is_op(node, linear) and node.args[1].target == name:
                with changed.graph.inserting_before(node):
                    node.args = (changed.graph.call_function(rounded, node.args[:1]), *node.args[1:])
        changed.module.recompile()
        measured = kld(exact, logits(changed, TOKENS))
        assert 1 / 3 < score / measured < 3, name


def test_progress(program: Program) -> None:
    seen: list[tuple[int, int]] = []
    sensitivity(program, TOKENS[:2], {}, lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == len(seen)
