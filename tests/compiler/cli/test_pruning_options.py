"""The options that leave parts of a model out: what they ask of the compiler, and what is said of them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from artifacts import write
from click.testing import CliRunner, Result

from llmc.compiler import api
from llmc.compiler.cli.main import main
from llmc.compiler.cli.pruning_options import _OPTIONS
from llmc.compiler.compress.prune_linears import PRUNE_ALGOS

PRUNING = {
    "layers": {"dropped": ["layers.3", "layers.5"], "importance": {}},
    "weights": {"pattern": "2:4", "algorithm": "sparsegpt", "sparsity": 0.5, "pruned": 120, "whole": {}},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the compiler was asked."""
    calls: dict[str, Any] = {}

    def compile(model: str, output: Path, *, watch: Any, **options: object) -> object:
        calls.update(options)
        manifest = write(tmp_path / "made", quantization=None, pruning=PRUNING if options.get("prune") else None)
        report = {"seconds": {}, "peak_rss_bytes": {"capture": 1}}
        return types.SimpleNamespace(path=output, manifest=manifest, report=report)

    monkeypatch.setattr(api, "compile", compile)
    return calls


def compile(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compile", "demo", "-o", "out", *arguments])


NAMES = ("prune", "prune_algo", "drop_layers", "calib")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("", {}),
        ("--prune 2:4", {"prune": "2:4"}),
        ("--prune 0.5 --prune-algo wanda --calib f", {"prune": "0.5", "prune_algo": "wanda", "calib": "f"}),
        ("--drop-layers 3 --calib f", {"drop_layers": 3, "calib": "f"}),
    ],
)
def test_options_reach_the_compiler(asked: dict[str, Any], arguments: str, wanted: dict[str, Any]) -> None:
    assert compile(*arguments.split()).exit_code == 0
    assert {name: asked[name] for name in NAMES if name in asked} == wanted


def test_a_recipe_may_say_so(asked: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"prune": 0.25, "prune_algo": "wanda", "drop_layers": 2, "calib": "f"}')
    result = compile("--config", str(recipe), "--drop-layers", "1")
    assert result.exit_code == 0 and "saves neither time nor bytes" in result.stderr
    assert {name: asked[name] for name in NAMES} == {
        "prune": 0.25,
        "prune_algo": "wanda",
        "drop_layers": 1,
        "calib": "f",
    }


def test_what_zeros_do_not_bring_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "compile", compile_)
    assert "saves neither time nor bytes" in compile("--prune", "2:4").stderr
    assert "saves neither" not in compile("--drop-layers", "1").stderr


def test_the_summary(asked: dict[str, Any]) -> None:
    said = "pruned       layers.3, layers.5 left out; 2:4 by sparsegpt: 50.0% of 120 weights is zero\n"
    assert said in compile("--prune", "2:4", "--drop-layers", "2").stdout
    assert "pruned" not in compile().stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("--drop-layers 0", "0 is not in the range"), ("--prune 2:4 --prune-algo x", "'x' is not one of")],
)
def test_wrong_usage(asked: dict[str, Any], arguments: str, said: str) -> None:
    result = compile(*arguments.split())
    assert result.exit_code == 2 and said in result.stderr and not asked


def test_the_choices_are_those_of_the_compiler() -> None:
    def command() -> None: ...

    for option in _OPTIONS:
        option(command)
    (algo,) = (p for p in command.__click_params__ if p.name == "prune_algo")  # type: ignore[attr-defined]
    assert tuple(algo.type.choices) == PRUNE_ALGOS
