"""The gate: what it compares with, in a process of its own, and again on any machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import artifact, speaking_model
from zoo.tiny import tiny_model

from llmc import LlmcError
from llmc.compiler.gate.bisect import FaultyPass
from llmc.compiler.gate.reference import PROMPTS, STEPS, TEXT
from llmc.compiler.gate.verify import check_in_new_process, gate_failed, verify
from llmc.errors import CheckFailedError
from llmc.runtimes.engines.selfcheck import Check, GateReference, GateReport
from llmc.runtimes.generate.tokenizer import Tokenizer


def test_the_reference_is_the_model_on_english() -> None:
    folder = artifact("speaking")
    reference = GateReference.read(folder)
    lengths = [size + STEPS for size in PROMPTS]
    assert (reference.prompts.tolist(), int(reference.steps)) == (list(PROMPTS), STEPS)
    assert reference.tokens.shape == (3, max(lengths))
    tokens = np.concatenate([row[:length] for row, length in zip(reference.tokens, lengths, strict=True)])
    assert tokens.tolist() == Tokenizer(folder).encode(TEXT)[: sum(lengths)]
    with torch.no_grad():
        logits = tiny_model("llama")(input_ids=torch.from_numpy(reference.tokens), use_cache=False).logits
    np.testing.assert_allclose(
        reference.logits, np.take_along_axis(logits.numpy(), reference.ids, 2), rtol=0, atol=1e-5
    )
    for row, length in enumerate(lengths):
        assert (reference.ids[row, :length, 0] == logits[row, :length].argmax(1).numpy()).all()
    assert str(reference.precision) == "fp32" and reference.rounded.shape == (0,)


def test_quantized_weights_have_a_second_reference() -> None:
    reference = GateReference.read(artifact("speaking", quantize="int4"))
    assert reference.rounded.shape == reference.logits.shape
    error = np.square(reference.rounded - reference.logits).mean() ** 0.5
    assert 0.01 < error / reference.logits.std() < 0.5


def test_against_the_model_itself() -> None:
    folder = artifact("speaking")
    report = verify(folder, speaking_model())
    assert report.passed and len(report.checks) == 4
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.norm.weight.mul_(torch.linspace(0.9, 1.1, 64))
    assert not verify(folder, other).passed


def test_what_broke_the_process_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(artifact("speaking"), tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["max_seq_len"] = 10**12  # no memory for that
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LlmcError) as caught:
        check_in_new_process(folder)
    assert caught.value.code == "GATE_BROKEN" and "memory" in caught.value.what.lower()
    (folder / "model.onnx").unlink()
    with pytest.raises(LlmcError) as caught:
        check_in_new_process(folder)
    assert caught.value.code == "ARTIFACT_DAMAGED"


def test_the_process_is_not_fooled_by_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llmc").mkdir()
    (tmp_path / "llmc" / "__init__.py").write_text("raise SystemExit('the wrong llmc')")
    monkeypatch.chdir(tmp_path)
    verdict = check_in_new_process(artifact("speaking"))
    assert verdict.report.passed and verdict.peak_rss_bytes > 1 << 20


def test_a_model_that_gives_nan() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(LlmcError) as caught:
        verify(artifact("speaking"), model)
    assert caught.value.code == "MODEL_NOT_FINITE"


def test_every_failed_check_is_in_the_refusal() -> None:
    report = GateReport("fp32", 1, [Check("a", 0.1, 1.0), Check("b", 2.0, 1.0), Check("c", float("nan"), 1.0)])
    error = gate_failed(report, FaultyPass("MatchRope", "prefill", "layers.0", 0.5))
    assert isinstance(error, CheckFailedError)
    assert error.code == "GATE_FAILED" and error.hint
    assert "b: 2, the limit is 1; c: nan" in error.what and "a: " not in error.what
    assert error.what.endswith(
        ". MatchRope of the prefill graph is the first pass to change the result (error 0.5), first in layers.0."
    )
    error = gate_failed(report, FaultyPass("MatchRope", "", "layers.0", 0.5))
    assert ". MatchRope is the first pass to change the result" in error.what
    error = gate_failed(report, None)
    assert error.what.endswith("Every pass keeps the numbers: the lowering or the runtime changes them.")
