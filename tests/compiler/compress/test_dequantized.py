"""Codes of a quantized checkpoint that are not kept are counted and explained."""

from __future__ import annotations

from pathlib import Path

import torch
from schemes import STORED

import llmc
from llmc.compiler.compress.dequantized import describe_dequantized, why_dequantized_weights
from llmc.ir.stages import Stage
from llmc.ir.stored import OnlyNumbers
from llmc.passes.quantize.quantization_plan import Choice
from llmc.passes.quantize.schemes import Grid
from llmc.runtimes.artifact.manifest import QuantizationSpec

from ..frontend.prequantized.files import tiny_llama


def lost(reason: str, grid: Grid | None = None) -> Choice:
    return Choice(grid, "", not_as_stored=reason)


def test_weights_that_never_were_codes_are_not_reported() -> None:
    assert why_dequantized_weights([Choice(None, "linear"), Choice(Grid("int8"), "linear")]) == ""


def test_one_reason_is_given_once() -> None:
    said = why_dequantized_weights([lost("of fp4"), Choice(None, "linear"), lost("of fp4")])
    assert said == "the checkpoint's codes of 2 weights are not kept: of fp4"


def test_reasons_are_counted_the_most_frequent_first() -> None:
    said = why_dequantized_weights([lost("of fp4"), lost("it is Q6_K", Grid("int8")), lost("it is Q6_K", Grid("int8"))])
    assert said == (
        "the checkpoint's codes of 3 weights are not kept, and 2 of them are quantized again: "
        "2 because it is Q6_K, 1 because of fp4"
    )


def test_all_are_quantized_again() -> None:
    said = why_dequantized_weights([lost("of fp4", Grid("int8"))] * 2)
    assert "and all of them are quantized again" in said


def test_a_float_model_has_an_entry_only_if_its_checkpoint_had_codes(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    program = llmc.capture(tmp_path, until=Stage.OPTIMIZED)
    assert describe_dequantized(program, STORED, "fp32") is None
    name = "model.layers.0.mlp.down_proj.weight"
    program.weights[name] = OnlyNumbers(program.weights[name], "of its format")
    assert describe_dequantized(program, STORED, "fp32") == QuantizationSpec(
        scheme=None,
        precision="fp32",
        algorithm="dequantized",
        why="the checkpoint's codes of 1 weight are not kept: of its format",
        weights={"fp32": 6},
        exact_inputs=0,
    )
    assert torch.equal(program.weights[name].evaluate(), tiny_llama().get_parameter(name))
