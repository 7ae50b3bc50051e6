"""Engines are built again from an artifact alone; a failure leaves it as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from compiled import artifact

from llmc.compiler.finalize import finalize
from llmc.compiler.targets.tensorrt import engines
from llmc.errors import LlmcError, UsageError
from llmc.runtimes.artifact.open import open_artifact
from llmc.runtimes.engines.tensorrt.section import Plan, TensorRtSection, read_section


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def neutral(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    shutil.copytree(artifact("speaking", target="trt", engine=False), folder)
    return folder


def fake_build(library: Any, path: Path, section: TensorRtSection, caches: Any, sms: list[str], folder: Path,
               watch: Any) -> Plan:  # fmt: skip
    """Write what depends on the arguments only."""
    assert path.exists() and caches and not section.plans
    (folder / "engine.plan").write_text(f"{sms} {section.profiles}")
    (folder / "engine.json").write_text("{}")
    return Plan("engine.plan", library.name, library.version, sms, "engine.json")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = type("Library", (), {"name": "tensorrt_rtx", "version": "1.7"})
    monkeypatch.setattr(engines, "find_library", lambda name: library)
    monkeypatch.setattr(engines, "build", fake_build)


def test_an_engine_is_added_and_replaced(neutral: Path, faked: None) -> None:
    before = content(neutral)
    manifest = finalize(neutral, sm="8.6,8.9", max_batch_size=4)
    section = read_section(open_artifact(neutral))
    assert section.plans == [Plan("engine.plan", "tensorrt_rtx", "1.7", ["8.6", "8.9"], "engine.json")]
    assert section.profiles["decode"].batch == 4 and manifest.built_with["tensorrt_rtx"] == "1.7"
    after = content(neutral)
    assert set(after) - set(before) == {"engine.plan", "engine.json"}
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")

    finalize(neutral, sm="12.0")
    plan, written = read_section(open_artifact(neutral)).plans[0], content(neutral)
    assert plan.sms == ["12.0"] and b"12.0" in written["engine.plan"] and set(written) == set(after)


def test_a_model_folder_of_the_server_goes_with_its_plan(
    neutral: Path, faked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = type("Library", (), {"name": "tensorrt", "version": "10.15"})
    monkeypatch.setattr(engines, "find_library", lambda name: library)
    finalize(neutral, sm="9.0", export="triton-server")
    manifest = open_artifact(neutral)
    (plan,) = (neutral / "triton-server").glob("*/1/model.plan")
    assert plan.read_bytes() == (neutral / "engine.plan").read_bytes()
    assert {str(path.relative_to(neutral)) for path in (plan, plan.parents[1] / "config.pbtxt")} <= set(manifest.files)
    finalize(neutral, sm="9.0")
    assert not (neutral / "triton-server").exists()


def test_the_server_takes_no_plans_for_rtx(neutral: Path, faked: None) -> None:
    before = content(neutral)
    with pytest.raises(LlmcError, match="SERVER_PLAN_MISSING"):
        finalize(neutral, sm="8.9", export="triton-server")
    assert content(neutral) == before


def test_a_failure_leaves_the_artifact_as_it_was(neutral: Path, faked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    finalize(neutral, sm="8.9")
    before = content(neutral)

    def fails(*arguments: Any) -> Plan:
        fake_build(*arguments)
        raise LlmcError("TRT_BUILD_FAILED", "It failed.")

    monkeypatch.setattr(engines, "build", fails)
    with pytest.raises(LlmcError, match="TRT_BUILD_FAILED"):
        finalize(neutral, sm="12.0")
    assert content(neutral) == before
    assert [path.name for path in neutral.parent.iterdir()] == [neutral.name]


def test_a_damaged_artifact_is_refused(neutral: Path, faked: None) -> None:
    (neutral / "model.onnx").write_bytes(b"x" * (neutral / "model.onnx").stat().st_size)
    with pytest.raises(LlmcError, match="ARTIFACT_DAMAGED"):
        finalize(neutral)


def test_other_targets_need_no_such_step() -> None:
    with pytest.raises(UsageError, match="FINALIZE_UNSUPPORTED"):
        finalize(artifact("speaking"))
