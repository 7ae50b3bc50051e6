"""What rounding is foretold to cost, against what it does cost."""

from __future__ import annotations

import pytest
import torch
from check_pass import inputs
from torch import Tensor
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.calibration import sensitivity as module
from llmc.compiler.calibration.sensitivity import sensitivity
from llmc.compiler.ir.program import Program
from llmc.compiler.ir.stages import Stage
from llmc.compiler.ir.weights import parameter

TOKENS = inputs(64, 30)[0]


@pytest.fixture(scope="module")
def program() -> Program:
    return llmc.capture(tiny_model("llama"), until=Stage.OPTIMIZED)


def noise(program: Program, size: float) -> dict[str, Tensor]:
    """An error for each matrix of a layer, of very different sizes."""
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
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    own, other = (torch.log_softmax(p(tokens, positions).double(), -1) for p in (program, changed))
    return float((own.exp() * (own - other)).sum(-1).mean())


def test_foretold_and_measured(program: Program) -> None:
    errors = noise(program, 0.1)
    foretold = sensitivity(program, TOKENS, {name: lambda part=part: part for name, part in errors.items()})
    measured = {name: divergence(program, {name: error}, TOKENS) for name, error in errors.items()}
    for name in errors:
        assert 1 / 3 < foretold[name] / measured[name] < 3
    ranks = torch.tensor([[sorted(d.values()).index(d[name]) for name in errors] for d in (foretold, measured)])
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    assert sum(foretold.values()) == pytest.approx(divergence(program, errors, TOKENS), rel=0.4)


def test_layers_are_no_borders(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece it is the same: nothing is lost where the way back is cut."""
    errors = {name: lambda part=part: part for name, part in noise(program, 0.1).items()}
    cut = sensitivity(program, TOKENS[:2], errors)
    assert len(module._segments(program)) >= 4
    calls = [node for node in program.nodes if node.op == "call_function"]
    monkeypatch.setattr(module, "_segments", lambda program: [calls])
    for name, score in sensitivity(program, TOKENS[:2], errors).items():
        assert score == pytest.approx(cut[name], rel=1e-4)


def test_progress(program: Program) -> None:
    seen: list[tuple[int, int]] = []
    sensitivity(program, TOKENS[:2], {}, lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == len(seen)
