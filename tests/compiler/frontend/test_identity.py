"""The identity of a model is its content."""

from __future__ import annotations

from pathlib import Path

import torch
from zoo.tiny import tiny_model

from llmc.compiler.frontend.identity import identity
from llmc.compiler.frontend.sources import find_source


def test_identity_is_the_content(tmp_path: Path) -> None:
    def of(model: object) -> str:
        source = find_source(model)  # type: ignore[arg-type]
        return identity(source, source.build(torch.float32))

    model = tiny_model("llama")
    assert of(model) == of(tiny_model("llama"))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "other")
    assert of(tmp_path / "one") == of(tmp_path / "other")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert of(model) != of(tiny_model("llama"))
    model.save_pretrained(tmp_path / "other")
    assert of(tmp_path / "one") != of(tmp_path / "other")


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    tiny_model("llama").save_pretrained(tmp_path / "snapshots" / commit)
    source = find_source(tmp_path / "snapshots" / commit)
    assert identity(source, source.build(torch.float32)) == f"commit:{commit}"
