"""Version ranges agree with the `packaging` library's implementation of PEP 440."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

from llmc.runtimes.artifact.versions import fits, installed

VERSIONS = """1 1.0 1.30 1.30.0 1.30.1 1.9 1.31.0.dev20260101 1.31.0rc1 1.31.0rc2.dev3 1.31.0a2 1.31.0b1 1.31.0
1.31.0.post1 1.31.0.post1.dev2 1.31.0+cu130 2.0.0rc1 2.0 2 2.0.1 10.1""".split()
LIMITS = [v for v in VERSIONS if not any(part in v for part in ("post", "dev", "+"))]  # versions used in ranges
SIGNS = [">=", "<=", "==", "!=", ">", "<"]


def test_every_pair_agrees_with_packaging() -> None:
    wrong = [
        (version, sign + limit)
        for version in VERSIONS
        for limit in LIMITS
        for sign in SIGNS
        if fits(version, sign + limit) != SpecifierSet(sign + limit).contains(version, prereleases=True)
    ]
    assert not wrong


@pytest.mark.parametrize(("version", "inside"), [("1.29.9", False), ("1.30", True), ("1.99.1", True), ("2.0", False)])
def test_all_clauses_must_hold(version: str, inside: bool) -> None:
    assert fits(version, ">=1.30, <2") is inside


@pytest.mark.parametrize(("version", "wanted"), [("1.0", "1.0"), ("1.0", ""), ("1.0", ">=x"), ("one", ">=1")])
def test_invalid_syntax_is_an_error(version: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=r"is not a version"):
        fits(version, wanted)


def test_installed_version_of_a_module() -> None:
    assert installed("numpy") == np.__version__
    assert installed("no_such_module") is None


@pytest.mark.parametrize("distribution", ["onnxruntime", "onnxruntime_gpu"])
def test_either_distribution_provides_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed("onnxruntime") is None
    folder = tmp_path / f"{distribution}-9.8.7.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: {distribution.replace('_', '-')}\nVersion: 9.8.7\n")
    importlib.invalidate_caches()
    assert installed("onnxruntime") == "9.8.7"
