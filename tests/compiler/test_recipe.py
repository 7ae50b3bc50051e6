"""Recipes: what they may say, and what is refused."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.recipe import read_recipe
from llmc.errors import LlmcError
from llmc.passes.quantize.schemes import Grid, Override


def recipe(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_json(tmp_path: Path) -> None:
    weights = [{"name": "*.down.weight", "scheme": "int8", "group": 64}, {"name": "a.*", "keep": True}]
    assert read_recipe(recipe(tmp_path, {"quantize": "int4", "algo": "rtn", "weights": weights})) == {
        "quantize": "int4",
        "algo": "rtn",
        "overrides": [Override("*.down.weight", Grid("int8", 64)), Override("a.*", None)],
    }


def test_toml(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    path = tmp_path / "recipe.toml"
    path.write_text('quantize = "int4"\n[[weights]]\nname = "x*"\nscheme = "int4"\ngroup = 32\nsymmetric = false\n')
    assert read_recipe(path)["overrides"] == [Override("x*", Grid("int4", 32, symmetric=False))]


def test_a_python_without_toml_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.compiler.recipe.sys", types.SimpleNamespace(version_info=(3, 10)))
    path = tmp_path / "recipe.toml"
    path.write_text('quantize = "int4"\n')
    with pytest.raises(LlmcError, match="RECIPE_INVALID") as caught:
        read_recipe(path)
    assert "no TOML" in caught.value.what and ".json" in caught.value.hint


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "can't be read"),
        ("[]", "not a table"),
        ({"quantise": "int4"}, "'quantise'"),
        ({"quantize": 4}, "quantize is 4"),
        ({"calib_samples": True}, "calib_samples is True"),
        ({"weights": {"name": "a"}}, "not a list"),
        ({"weights": [{"scheme": "int8"}]}, "has no name"),
        ({"weights": [{"name": "a"}]}, "has no scheme"),
        ({"weights": [{"name": "a", "bits": 3}]}, "'bits'"),
        ({"weights": [{"name": "a", "scheme": "int3"}]}, "int3"),
        ({"weights": [{"name": "a", "scheme": "int4", "group": 48}]}, "48"),
        ({"quantize": "int3"}, "quantize is 'int3'"),
        ({"calib_samples": 0}, "calib_samples is 0"),
        ({"spec_tokens": 65}, "spec_tokens is 65"),
        ({"weights": [{"name": "a", "keep": True, "scheme": "int4"}]}, "'keep'"),
    ],
)
def test_refused(tmp_path: Path, document: Any, said: str) -> None:
    with pytest.raises(LlmcError, match="RECIPE_INVALID") as caught:
        read_recipe(recipe(tmp_path, document))
    assert said in caught.value.what and caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="RECIPE_INVALID"):
        read_recipe(tmp_path / "none.json")
