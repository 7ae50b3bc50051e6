"""Calibration of whole programs: each algorithm beats plain rounding, and changes nothing before it rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import input_group, new_cache, uneven_program
from check_pass import inputs
from schemes import scheme as make_scheme
from torch import Tensor

import llmc
from llmc.compiler.compress import calibrate as module
from llmc.compiler.compress.calibrate import ALGORITHMS, Calibration, calibrate
from llmc.ir.program import Program
from llmc.passes.quantize.move_scales import MoveScales
from llmc.passes.quantize.quantization_plan import QuantizationPlan, analyse
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.schemes import Grid, Override, Scheme

INT4 = make_scheme("int4", Grid("int4", 16))


@pytest.fixture
def program() -> Program:
    return uneven_program()


TOKENS = inputs(24, 30)[0]


def calibrated(program: Program, algorithm: str, scheme: Scheme = INT4) -> tuple[QuantizationPlan, Calibration]:
    plan = analyse(program, scheme)
    return plan, calibrate(program, plan, ALGORITHMS[algorithm], TOKENS, new_cache(), input_group=input_group)


def divergence(program: Program, plan: QuantizationPlan, found: Calibration | None, tokens: Tensor) -> float:
    """KL divergence of the quantized program from the program."""
    quantized = program.copy()
    if found is not None:
        MoveScales(found.scales)(quantized)
    Quantize(plan, found.quantized if found else {})(quantized)
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    own, other = (torch.log_softmax(p(tokens, positions), -1) for p in (program, quantized))
    return float((own.exp() * (own - other)).sum(-1).mean())


@pytest.mark.parametrize(("algorithm", "share"), [("gptq", 0.67), ("awq", 0.95)])
def test_better_than_rounding_to_nearest(program: Program, algorithm: str, share: float) -> None:
    plan, found = calibrated(program, algorithm)
    other = inputs(9, 17)[0]
    for tokens in (TOKENS, other):
        assert divergence(program, plan, found, tokens) < share * divergence(program, plan, None, tokens)


@pytest.mark.parametrize("algorithm", ["smoothquant", "awq", "gptq"])
def test_the_float_program_stays_what_it_was(program: Program, algorithm: str) -> None:
    _, found = calibrated(program, algorithm)
    moved = program.copy()
    assert MoveScales(found.scales)(moved).matches == len(found.scales) > 0
    tokens = inputs(3, 11)
    torch.testing.assert_close(moved(*tokens), program(*tokens), atol=1e-5, rtol=1e-5)


def test_the_program_is_left_as_it_was(program: Program) -> None:
    before = {name: weight.key for name, weight in program.weights.items()}
    calibrated(program, "gptq")
    assert {name: weight.key for name, weight in program.weights.items()} == before


def test_only_what_the_plan_names(program: Program) -> None:
    names = [name for name in program.weights if "down_proj" in name]
    plan = analyse(program, INT4, [Override("*down_proj*", None)])
    found = calibrate(program, plan, ALGORITHMS["gptq"], TOKENS, new_cache(), input_group=input_group)
    assert names and not set(names) & set(found.quantized) and len(found.quantized) > 2


def test_it_goes_on_where_it_was_interrupted(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, place, calls = analyse(program, INT4), new_cache(), 0
    _, whole = calibrated(program, "gptq")
    plainly = module.gptq

    def interrupted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return plainly(*args)

    def again() -> Calibration:
        return calibrate(program, plan, ALGORITHMS["gptq"], TOKENS, place, input_group=input_group)

    monkeypatch.setattr(module, "gptq", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again()
    found = again()
    assert calls == 4 + len(whole.quantized) - 3  # three were there
    for name, parts in whole.quantized.items():
        assert torch.equal(found.quantized[name].codes.evaluate(), parts.codes.evaluate())
        assert torch.equal(found.quantized[name].scales.evaluate(), parts.scales.evaluate())
    assert set(found.scales) == set(whole.scales)


def test_progress(program: Program) -> None:
    seen: list[tuple[int, int]] = []
    plan = analyse(program, INT4)
    calibrate(
        program,
        plan,
        ALGORITHMS["awq"],
        TOKENS,
        new_cache(),
        input_group=input_group,
        watch=lambda *step: seen.append(step),
    )
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == list(range(len(seen)))


def test_a_static_scale_of_inputs(program: Program) -> None:
    scheme = make_scheme("static", Grid("int8", activation="int8", static=True))
    _, found = calibrated(program, "smoothquant", scheme)
    for parts in found.quantized.values():
        assert parts.x_scale is not None and parts.x_scale.shape == () and float(parts.x_scale.evaluate()) > 0


def test_folder(tmp_path: Path) -> None:
    """From the model on disk to the artifact, once."""
    from compiled import speaking_model

    text = tmp_path / "text.txt"
    text.write_text("the sea is blue, and so is the sky. " * 40)
    made = llmc.compile(
        speaking_model(), tmp_path / "out", quantize="int4", algo="gptq", group_size=16,
        calib=text, calib_samples=3, calib_length=40,
    )  # fmt: skip
    assert made.manifest.quantization is not None and made.manifest.quantization.algorithm == "gptq"
    assert "quantize" in made.report["seconds"]
