"""The steps, snapshots and views that an inspection records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stack import Layer, Stack
from torch import Tensor
from torch.nn import functional as F

from llmc import LlmcError
from llmc.compiler.inspect.record import Inspection, inspect_model
from llmc.ir.stages import Stage
from llmc.passes import pipeline
from llmc.passes.base import Reach
from llmc.passes.match.match_layer_norm import MatchLayerNorm
from llmc.passes.match.match_rms_norm import MatchRmsNorm
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.pipeline import PIPELINE

USUAL = (1e-5, "silu")
STAGES = [p for p in PIPELINE if isinstance(p, Reach)]


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspect_model(Stack(USUAL, USUAL, (1e-6, "gelu")), until=Stage.CANONICAL, details=True)


def test_each_pass_is_one_step(inspection: Inspection) -> None:
    ran = PIPELINE[: 1 + next(i for i, p in enumerate(PIPELINE) if isinstance(p, Reach))]
    assert [step.record.name for step in inspection.steps] == [p.name for p in ran]
    (norms,) = (step for step in inspection.steps if step.record.name == "MatchRmsNorm")
    assert norms.record.matches == 3
    assert norms.after.ops["llmc.rms_norm"] == 3
    assert norms.about == type(MatchRmsNorm()).__doc__.strip().replace("\n    ", "\n")
    assert inspection.stage is Stage.CANONICAL
    assert inspection.refusal is None
    assert list(inspection.moments) == ["captured", "canonical"]


def test_snapshots_show_the_program_at_their_step(inspection: Inspection) -> None:
    assert inspection.captured.ops["aten.rsqrt"] == 3
    assert "aten.rsqrt" not in inspection.steps[-1].after.ops
    assert "aten.rsqrt" in inspection.captured.views["layers.0"].text
    assert "llmc.rms_norm" in inspection.steps[-1].after.views["layers.0"].text
    assert inspection.steps[-1].after.ops == dict(inspection.program.ops())


def test_a_view_does_not_contain_the_layers_name(inspection: Inspection) -> None:
    text = inspection.steps[-1].after.views["layers.1"].text
    assert text.splitlines()[0] == "# *"
    assert 'weights["*.up.weight"]' in text
    assert "layers.1" not in text


def test_layers_are_grouped_by_all_snapshots() -> None:
    class OtherSpelling(Layer):
        def forward(self, x: Tensor) -> Tensor:
            normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.scale
            return x + F.silu(self.up(normed))

    model = Stack(USUAL, USUAL)
    model.layers.append(OtherSpelling(*USUAL, 2))
    inspection = inspect_model(model, until=Stage.CANONICAL)
    assert len(set(inspection.steps[-1].after.kinds.values())) == 1
    assert inspection.layers == [["layers.0", "layers.1"], ["layers.2"]]


def test_ops_are_counted_by_section(inspection: Inspection) -> None:
    after = inspection.steps[-1].after
    assert sum(sum(ops.values()) for ops in after.ops_of.values()) == sum(after.ops.values())


def test_tied_parameters_are_counted_once() -> None:
    model = Stack(USUAL)
    model.head.weight = model.embed.weight
    inspection = inspect_model(model, until=Stage.CANONICAL)
    assert inspection.parameters == sum(p.numel() for p in model.parameters())
    assert inspection.captured.views == {}


def test_steps_before_a_refusal_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PIPELINE", [RemoveNoOps(), MatchLayerNorm(), MatchRmsNorm(), *STAGES])
    inspection = inspect_model(Stack(USUAL))
    assert inspection.refusal is not None
    assert inspection.refusal.code == "IR_INVALID"
    assert [step.record.name for step in inspection.steps] == ["RemoveNoOps", "MatchLayerNorm", "MatchRmsNorm"]
    assert inspection.stage is Stage.CAPTURED
    assert list(inspection.moments) == ["captured", "now"]


def test_a_model_that_does_not_exist_is_refused() -> None:
    with pytest.raises(LlmcError, match="MODEL_NOT_FOUND"):
        inspect_model("no such model")


def test_dump_and_watch(tmp_path: Path) -> None:
    seen: list[str] = []
    inspection = inspect_model(
        Stack(USUAL), until=Stage.CANONICAL, dump_ir=tmp_path, watch=lambda subject, result: seen.append(subject.name)
    )
    assert seen == [step.record.name for step in inspection.steps]
    assert len(list(tmp_path.glob("*.py"))) == 1 + len(seen)


def test_fuel_stops_rewriting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_FUEL", "2")
    inspection = inspect_model(Stack(USUAL, USUAL, USUAL))
    assert sum(step.record.matches for step in inspection.steps) == 2
    assert inspection.stage is Stage.CAPTURED
