"""The section of target "trt": what is refused, and the order of profiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from neutral import PLAN, write_neutral

from llmc.errors import LlmcError
from llmc.runtimes.artifact.manifest import Manifest
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.tensorrt.section import Profile, read_section

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_neutral(tmp_path / "out")


def test_there_and_back(manifest: Manifest, tmp_path: Path) -> None:
    section = read_section(read_manifest(tmp_path / "out"))
    assert section.plans == [PLAN] and section.profiles["prefill"] == Profile(1, 32) and section.dtype == "fp16"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s["profiles"].pop("decode"), "its profiles are not prefill and decode"),
        (lambda s: s["profiles"].update(verify={"batch": 1, "tokens": 4}), "its profiles are not prefill and decode"),
        (lambda s: s["profiles"]["prefill"].update(tokens=65), "profile prefill has an impossible size"),
        (lambda s: s["profiles"]["decode"].update(batch=0), "profile decode has an impossible size"),
        (lambda s: s.update(graph="other.onnx"), "names other.onnx"),
        (lambda s: s["plans"][0].update(file="../engine.plan"), "names ../engine.plan"),
        (lambda s: s.update(dtype="bf16"), "its caches are not static ones of bf16"),
        (lambda s: s["plans"][0].update(library="torch"), "not 'tensorrt_rtx' or 'tensorrt'"),
    ],
)
def test_what_is_refused(manifest: Manifest, change: Change, why: str) -> None:
    section = json.loads(json.dumps(manifest.section))
    change(section)
    with pytest.raises(LlmcError) as caught:
        read_section(replace(manifest, section=section))
    assert caught.value.code == "ARTIFACT_INVALID" and why in caught.value.what


def test_profiles_are_in_the_order_of_a_plan(tmp_path: Path) -> None:
    """A manifest sorts them by name, in which decode comes first."""
    write_neutral(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.section["profiles"]) == ["decode", "prefill"]
    assert list(read_section(manifest).profiles) == ["prefill", "decode"]
