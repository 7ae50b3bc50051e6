"""Choices of scheme and algorithm come out in the artifact, and are said there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compiled import speaking_model
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.compress.cache import CalibrationCache
from llmc.compiler.compress.quantization import Quantization, quantize
from llmc.compiler.config import CompileConfig
from llmc.compiler.frontend.sources import find_source
from llmc.compiler.targets.base import InputExemption, Target
from llmc.compiler.targets.ort.target import OrtTarget
from llmc.compiler.targets.registry import find_target, make_config
from llmc.errors import LlmcError
from llmc.ir.stages import Stage
from llmc.kernels.ops import quant_linear
from llmc.passes.quantize.schemes import Grid, Override
from llmc.passes.queries import is_op
from llmc.runtimes.measure.texts import Text

TEXT = Text("the sea is blue, and so is the sky; what is between them is grey. " * 60, "text", "")


def decided(tmp_path: Path, model: Any = None, *, target: Target | None = None, **options: Any) -> Quantization | None:
    source = find_source(model or speaking_model())
    program = llmc.capture(model or speaking_model(), until=Stage.OPTIMIZED)
    config, cache = make_config(**options), CalibrationCache(tmp_path / "cache")
    return quantize(source, program, config, target or find_target(), TEXT if config.calibrates else None, cache)


def test_nothing_asked_for(tmp_path: Path) -> None:
    assert decided(tmp_path) is None


def test_the_algorithm_of_the_scheme(tmp_path: Path) -> None:
    found = decided(tmp_path, quantize="int8")
    assert found is not None and found.algorithm == "smoothquant" and not found.candidates
    assert found.precision == "int8" and [p.name for p in found.passes][-1] == "Quantize"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    """Without a tokenizer, a default algorithm falls back to rtn and says so; a given one is refused."""
    found = decided(tmp_path, tiny_model("llama"), quantize="int4")
    assert found is not None and found.algorithm == "rtn" and "no tokenizer" in found.why
    with pytest.raises(LlmcError, match="TOKENIZER"):
        decided(tmp_path, tiny_model("llama"), quantize="int4", algo="gptq")
    found = decided(tmp_path, tiny_model("llama"), quantize="int4", algo="rtn")
    assert found is not None and not found.why


def test_bits_are_raised_where_they_are_worth_it(tmp_path: Path) -> None:
    found = decided(tmp_path, quantize="int4", raise_share=0.4)
    assert found is not None and 0 < len(found.raised) < len(found.candidates)
    assert found.candidates[0].name in found.raised
    program = llmc.capture(speaking_model(), until=Stage.OPTIMIZED)
    for subject in found.passes:
        subject(program)
    calls = [quant_linear.bind(n.args, dict(n.kwargs)) for n in program.nodes if is_op(n, quant_linear)]
    assert sum(call["scheme"] == "int8" for call in calls) == len(found.raised) + 1  # and the head
    assert found.precision == "int4" and sum(found.spec().weights.values()) == len(found.plan.weights)


def test_none_or_all_of_them(tmp_path: Path) -> None:
    none, whole = (decided(tmp_path, quantize="int4", raise_share=share) for share in (0.0, 1.0))
    assert none is not None and whole is not None
    assert not none.raised and len(whole.raised) == len(whole.candidates) and whole.precision == "int8"


class Exempting(OrtTarget):
    """Keeps the inputs of the most sensitive linears exact, up to a share of all numbers."""

    def __init__(self, share: float) -> None:
        self.share = share

    def input_exemption(self, config: CompileConfig) -> InputExemption:
        return InputExemption(target_loss=0.0, share=self.share)


def test_sensitive_inputs_stay_exact_as_far_as_the_target_allows(tmp_path: Path) -> None:
    found = [decided(tmp_path, target=Exempting(share), quantize="int4", raise_share=0) for share in (0.0, 0.4, 1.0)]
    none, some, all_linears = (one.exact_inputs for one in found if one is not None)
    assert not none and none < some < all_linears == set(found[0].calibration.quantized)  # type: ignore[union-attr]
    assert [one.spec().exact_inputs for one in found if one is not None] == [0, len(some), len(all_linears)]


def test_no_input_is_exempted_if_no_kernel_quantizes_inputs(tmp_path: Path) -> None:
    found = decided(tmp_path, quantize="int4", round_prompts=False)
    assert found is not None and not found.exact_inputs and found.candidates


def test_overrides(tmp_path: Path) -> None:
    exceptions = (Override("*down_proj*", Grid("int8")), Override("*layers.0.*", None))
    found = decided(tmp_path, quantize="int4", algo="rtn", overrides=exceptions)
    assert found is not None
    assert found.spec().weights["as it was"] == 4
    assert found.spec().weights["int8 by channel"] == 1
    with pytest.raises(LlmcError, match="RECIPE_UNUSED"):
        decided(tmp_path, quantize="int4", algo="rtn", overrides=(Override("*no_such*", None),))


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="GROUP_SIZE_INDIVISIBLE") as caught:
        decided(tmp_path, quantize="int4", group_size=256)
    assert "inputs of" in caught.value.what and "64" in caught.value.hint


def test_results_of_calibration_are_gone_when_the_artifact_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT.content)
    llmc.compile(speaking_model(), tmp_path / "out", quantize="int4", calib=text, calib_samples=4, calib_length=40)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
