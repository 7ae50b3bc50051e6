"""Canonical JSON files."""

from __future__ import annotations

from pathlib import Path

from llmc.runtimes.artifact.canonical import write_json


def test_json_is_canonical(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"b": "ü", "a": [1]})
    assert (tmp_path / "x").read_text() == '{\n  "a": [\n    1\n  ],\n  "b": "ü"\n}\n'
