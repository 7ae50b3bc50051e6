"""Version ranges, held to the `packaging` library's reading of PEP 440."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from llmc.runtimes.artifact.versions import fits, installed

VERSIONS = """1 1.0 1.30 1.30.0 1.30.1 1.9 1.31.0.dev20260101 1.31.0rc1 1.31.0rc2.dev3 1.31.0a2 1.31.0b1 1.31.0
1.31.0.post1 1.31.0.post1.dev2 1.31.0+cu130 2.0.0rc1 2.0 2 2.0.1 10.1""".split()
LIMITS = [v for v in VERSIONS if not any(part in v for part in ("post", "dev", "+"))]  # what a range may name
SIGNS = [">=", "<=", "==", "!=", ">", "<"]


def test_every_pair_is_as_packaging_has_it() -> None:
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
def test_what_cannot_be_read_is_said(version: str, wanted: str) -> None:
    with pytest.raises(ValueError):
        fits(version, wanted)


def test_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    from llmc.runtimes.artifact import versions

    assert installed("numpy") == numpy.__version__
    assert installed("no_such_module") is None
    monkeypatch.setitem(versions._PROVIDERS, "onnxruntime", ("no-such-package", "numpy"))
    assert installed("onnxruntime") == numpy.__version__
