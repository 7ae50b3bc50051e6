"""What could not be checked where an artifact was compiled is checked where it is served, once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import artifact

import llmc
from llmc.compiler.gate.verify import verify
from llmc.errors import CheckFailedError, LlmcError
from llmc.runtimes.artifact.manifest import MANIFEST, Manifest, Verified
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.cache_folder import cache_dir
from llmc.runtimes.engines import load as loading
from llmc.runtimes.engines.device_check import result_path
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.ort.engine import OrtEngine

PLATFORM = ("Mock GPU", "CUDA 13.0", "library 1.0")


class DeviceEngine(OrtEngine):
    """An engine of a device.

    Attributes:
        calls: how many calls all engines have made.
        noise: is added to logits.
        closed: how many engines were closed.
    """

    platform, noise, calls, closed = PLATFORM, 0.0, 0, 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.spec = replace(self.spec, platform=DeviceEngine.platform)

    def forward(self, batch: Any) -> HostLogits:
        DeviceEngine.calls += 1
        values = super().forward(batch).numpy()
        random = np.random.default_rng(DeviceEngine.calls)
        return HostLogits(values + random.normal(scale=DeviceEngine.noise, size=values.shape).astype(np.float32))

    def close(self) -> None:
        DeviceEngine.closed += 1
        super().close()


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[DeviceEngine]]:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "find_engine", lambda target: DeviceEngine)
    for name, value in {"platform": PLATFORM, "noise": 0.0, "calls": 0, "closed": 0}.items():
        monkeypatch.setattr(DeviceEngine, name, value)
    return DeviceEngine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact that remains to be checked."""
    made = shutil.copytree(artifact("speaking"), tmp_path / "out")
    write(made, replace(read_manifest(made), verified=Verified("graph", "gate")))
    return made


def write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_bytes(manifest.to_json())


def checks_again(folder: Path) -> bool:
    """Load an artifact; return True if the engine was called for it."""
    before = DeviceEngine.calls
    llmc.load(folder)
    return DeviceEngine.calls > before


def results() -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in (cache_dir() / "verified").glob("*")]


def test_it_is_checked_once_and_the_result_is_kept(folder: Path) -> None:
    engine = llmc.load(folder, slots=2)
    assert DeviceEngine.calls > 10 and engine.slots == 2
    (result,) = results()
    assert result["passed"] and result["platform"] == list(PLATFORM) and len(result["checks"]) == 4
    assert result["artifact"] == str(folder) and not checks_again(folder)


@pytest.mark.parametrize("part", range(3))
def test_another_platform_is_checked_too(folder: Path, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_again(folder)
    monkeypatch.setattr(DeviceEngine, "platform", (*PLATFORM[:part], "another", *PLATFORM[part + 1 :]))
    assert checks_again(folder) and len(results()) == 2 and not checks_again(folder)


def test_another_artifact_is_checked_too(folder: Path) -> None:
    assert checks_again(folder)
    manifest = read_manifest(folder)
    write(folder, replace(manifest, built_with=manifest.built_with | {"llmc": "0.0.1"}))
    assert checks_again(folder) and len(results()) == 2


def test_a_device_that_computes_something_else_does_not_serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceEngine, "noise", 1.0)
    for _ in range(2):  # a result that failed is not taken for one that passed
        with pytest.raises(CheckFailedError) as caught:
            llmc.load(folder)
        error = caught.value
        assert error.code == "DEVICE_CHECK_FAILED" and "Mock GPU, CUDA 13.0, library 1.0" in error.what
        assert "prompts: " in error.what and f"llmc verify {folder}" in error.hint and "\n" not in str(error)
    assert DeviceEngine.closed == 2 and [result["passed"] for result in results()] == [False]
    monkeypatch.setattr(DeviceEngine, "noise", 0.0)
    assert checks_again(folder) and not checks_again(folder)


def test_the_check_can_be_left_out(folder: Path) -> None:
    llmc.load(folder, check_device=False)
    assert DeviceEngine.calls == 0


def test_what_was_checked_where_it_was_compiled_is_not_checked_again() -> None:
    assert read_manifest(artifact("speaking")).verified == Verified("engine", "nothing")
    assert b'"verified"' not in (artifact("speaking") / MANIFEST).read_bytes()
    assert not checks_again(artifact("speaking"))


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[true]", b'{"passed": "yes"}'])
def test_a_damaged_result_counts_for_nothing(folder: Path, content: bytes) -> None:
    path = result_path(hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(), PLATFORM)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert checks_again(folder) and not checks_again(folder)


def test_a_cache_folder_that_can_not_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file"))
    assert checks_again(folder) and checks_again(folder)


def test_an_artifact_that_lacks_its_reference(folder: Path) -> None:
    manifest = read_manifest(folder)
    write(folder, replace(manifest, files={k: v for k, v in manifest.files.items() if k != "reference.npz"}))
    (folder / "reference.npz").unlink()
    with pytest.raises(LlmcError) as caught:
        llmc.load(folder)
    assert caught.value.code == "REFERENCE_MISSING" and DeviceEngine.closed == 1


def test_verify_shows_what_the_device_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceEngine, "noise", 1.0)
    report = verify(folder)
    assert not report.passed and len(report.checks) == 4 and results() == []
