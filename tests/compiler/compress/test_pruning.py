"""From a model to an artifact that leaves parts of it out, says which, and is what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import speaking_model

import llmc
from llmc import LlmcError
from llmc.compiler.compress import pruning
from llmc.compiler.compress.cache import CalibrationCache
from llmc.compiler.compress.quantization import quantize
from llmc.compiler.frontend.sources import find_source
from llmc.compiler.gate.verify import verify
from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.compiler.targets.ort import write
from llmc.compiler.targets.registry import find_target, make_config
from llmc.ir.stages import Stage
from llmc.passes.quantize.quantize import round_to_nearest
from llmc.runtimes.artifact.manifest import DroppedLayers, PrunedWeights, PruningSpec
from llmc.runtimes.cache_folder import cache_dir
from llmc.runtimes.engines.selfcheck import LIMITS, GateReference
from llmc.runtimes.measure.texts import read_text

TEXT = "the sea is blue, and so is the sky. " * 40
LAST = "model.layers.1"


def compiled(folder: Path, **options: Any) -> llmc.Artifact:
    (folder / "text.txt").write_text(TEXT)
    return llmc.compile(
        speaking_model(), folder / "out", calib=folder / "text.txt", calib_samples=3, calib_length=40, **options
    )


@pytest.mark.parametrize(("prune", "algorithm"), [("2:4", "sparsegpt"), (0.5, "wanda")])
def test_weights(tmp_path: Path, prune: str | float, algorithm: str) -> None:
    made = compiled(tmp_path, prune=prune, prune_algo=algorithm)
    weights = PrunedWeights(str(prune), algorithm, sparsity=0.5, pruned=8, whole={"it is the head": 1})
    assert made.manifest.pruning == PruningSpec(weights=weights)
    stored = np.fromfile(made.path / "model.onnx.data", np.float32)
    counted = sum(p.numel() for n, p in modules() if "proj" in n) / 2
    assert (stored == 0).sum() == pytest.approx(counted, rel=0.01), "what runs has these zeros"
    report = json.loads((made.path / "verify.json").read_text())
    assert report["precision"] == "pruned fp32" and len(report["checks"]) == 8
    for check in report["checks"]:
        assert (check["measured"] < 1e-5) == check["name"].endswith("rounded alike")
    assert verify(made.path, speaking_model()).passed


def modules() -> list[tuple[str, torch.nn.Parameter]]:
    from zoo.tiny import tiny_model

    return list(tiny_model("llama").named_parameters())


def test_layers(tmp_path: Path) -> None:
    made = compiled(tmp_path, drop_layers=1)
    pruning = made.manifest.pruning
    assert pruning is not None and pruning.weights is None and isinstance(pruning.layers, DroppedLayers)
    importance = pruning.layers.importance
    assert list(importance) == ["model.layers.0", LAST] and importance[LAST] < importance["model.layers.0"]
    assert pruning.layers.dropped == [LAST]
    assert made.manifest.model.layers == len(made.manifest.caches) == 1
    whole = sum(p.numel() for _, p in modules()) * 4
    assert (made.path / "model.onnx.data").stat().st_size < 0.8 * whole
    reference = GateReference.read(made.path)
    assert str(reference.precision) == "pruned fp32" and reference.rounded.ndim == 3


def test_both_and_nothing(tmp_path: Path) -> None:
    both = compiled(tmp_path, drop_layers=1, prune="0.5").manifest.pruning
    assert both is not None and both.weights is not None and both.layers is not None
    assert both.weights.pruned == 4 and both.layers.dropped == [LAST]
    assert llmc.compile(speaking_model(), tmp_path / "whole").manifest.pruning is None


def test_a_wrong_artifact_is_seen_although_the_model_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(g: Any, gate: Any, up: Any, act: str, **options: Any) -> str:
        return STANDARD["llmc.gated_act"](g, up, gate, act, **options)

    monkeypatch.setitem(write.TABLES, "contrib", {**write.TABLES["contrib"], "llmc.gated_act": swapped})
    with pytest.raises(LlmcError) as caught:
        compiled(tmp_path, drop_layers=1, prune="2:4")
    assert caught.value.code == "GATE_FAILED" and "rounded alike" in caught.value.what
    assert "the lowering or the runtime" in caught.value.what, "not what was left out on purpose"


@pytest.mark.parametrize("algo", [None, "rtn"])
def test_quantization_follows_and_keeps_zeros(tmp_path: Path, algo: str | None) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    text = read_text(tmp_path / "text.txt")
    config = make_config(
        prune="2:4", quantize="int4", algo=algo, group_size=16, calib=text.source, calib_samples=3, calib_length=40
    )
    source, cache = find_source(speaking_model()), CalibrationCache(tmp_path / "cache")
    program = llmc.capture(speaking_model(), until=Stage.OPTIMIZED)

    def watch(phase: str, done: int, total: int) -> None: ...

    found = pruning.choose_weights(pruning.Pruning(), source, program, config, text, cache, watch)
    for subject in found.passes:
        subject(program)
    gone = {name: program.weights[name].evaluate() == 0 for name in found.pruned.weights}
    rounding = quantize(source, program, config, find_target("ort"), text, cache)
    assert rounding is not None and rounding.algorithm == (algo or "gptq")
    assert set(rounding.calibration.quantized) == (set(gone) if algo is None else set())
    for name, zeros in gone.items():
        choice = rounding.plan.weights[name]
        parts = rounding.calibration.quantized.get(name) or round_to_nearest(program.weights[name], choice)
        assert (parts.value(choice)[zeros] == 0).all() and zeros.float().mean() == 0.5


def test_limits() -> None:
    for precision in [name for name in LIMITS if not name.startswith("pruned")]:
        pruned = LIMITS[f"pruned {precision}"]
        assert pruned.rounded == LIMITS[precision].rounded and pruned.model > 1.4


def test_layers_that_are_weighed_are_not_weighed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    calls = 0
    weigh = pruning.importance

    def counted(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return weigh(*given)

    def interrupted(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "importance", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pruning, "prune", interrupted)
        compiled(tmp_path, drop_layers=1, prune="2:4")
    assert calls == 1 and list((cache_dir() / "calibration").iterdir())
    compiled(tmp_path, drop_layers=1, prune="2:4")
    assert calls == 1 and not list((cache_dir() / "calibration").iterdir())


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"drop_layers": 2}, "LAYERS_TOO_FEW", "has 2 layers, so 2 can't be dropped"),
        ({"drop_layers": 1, "tokenizer": False}, "TOKENIZER", "tokenizer"),
        ({"prune": 0.5, "tokenizer": False}, "TOKENIZER", "tokenizer"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], code: str, said: str) -> None:
    options = dict(options)
    model = shutil.copytree(speaking_model(), tmp_path / "model")
    if not options.pop("tokenizer", True):
        for path in model.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(LlmcError) as caught:
        llmc.compile(model, tmp_path / "out", **options)
    assert caught.value.code.startswith(code) and said in caught.value.what
    assert not (tmp_path / "out").exists()
