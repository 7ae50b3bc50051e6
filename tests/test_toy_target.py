"""A target outside of llmc passes the gate and works with every verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compiled import speaking_model
from zoo.tiny import tiny_model

Command = Callable[..., subprocess.CompletedProcess[str]]
ENTRY_POINTS = "[llmc.targets]\ntoy = toy_target:TARGET\n\n[llmc.engines]\ntoy = toy_target:ENGINE\n"


@pytest.fixture(scope="module")
def llmc(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return the `llmc` command in a process where the toy is installed as a package."""
    installed = tmp_path_factory.mktemp("site")
    metadata = installed / "toy_target-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-target\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    paths = [str(installed), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        code = "from llmc.compiler.cli.main import main; main(prog_name='llmc')"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


@pytest.fixture(scope="module")
def artifact(llmc: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile a model with a tokenizer for the toy."""
    folder = tmp_path_factory.mktemp("toy") / "out"
    done = llmc("compile", speaking_model(), "-o", folder, "--target", "toy", "--motto", "Small is fine.", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["manifest"]["target"] == "toy"
    assert document["manifest"]["section"]["motto"] == "Small is fine."
    return folder


@pytest.mark.parametrize(("model_type", "options"), [("gemma3_text", ()), ("gpt2", ("--int8", "--algo", "rtn"))])
def test_models_pass_the_gate(llmc: Command, tmp_path: Path, model_type: str, options: tuple[str, ...]) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    done = llmc("compile", tmp_path / "model", "-o", tmp_path / "out", "--target", "toy", *options)
    assert done.returncode == 0, done.stderr
    assert "gate         passed" in done.stdout
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["passed"]


def test_it_answers(llmc: Command, artifact: Path) -> None:
    done = llmc("run", artifact, "To be", "--max-tokens", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < len(json.loads(done.stdout)["token_ids"]) <= 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verify", "{artifact}"), "All checks passed."),
        (("verify", "{artifact}", "{model}"), "All checks passed."),
        (("inspect", "{artifact}"), "toy"),
        (("bench", "{artifact}", "-p", "8", "-n", "4", "-r", "1"), "tokens/s"),
        (("eval", "{artifact}", "--max-tokens", "64", "--window", "32"), "perplexity"),
        (("plan", "{model}", "--target", "toy"), "int8"),
        (("doctor",), "toy"),
    ],
)
def test_every_verb(llmc: Command, artifact: Path, arguments: tuple[str, ...], said: str) -> None:
    places = {"artifact": artifact, "model": speaking_model()}
    done = llmc(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_command_line_shows_its_options(llmc: Command) -> None:
    text = llmc("compile", "--help").stdout
    assert "--target [ort|toy|trt]" in text and "Target toy:" in text and "--motto" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "toy", "--int4"), "Target toy can't run --quantize int4. Set --quantize to one of int8."),
        (("--target", "toy", "--ops", "standard"), "--ops is an option of target ort, not of toy."),
        (("--motto", "x"), "--motto is an option of target toy, not of ort."),
        (("--target", "toy", "--kv-cache-dtype", "int8"), "Target toy has no --kv-cache-dtype int8."),
    ],
)
def test_it_refuses_what_it_cannot_do(llmc: Command, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = llmc("compile", "no such model", "-o", tmp_path / "out", *options)
    assert done.returncode == 2 and said in " ".join(done.stderr.split())


def test_layers_of_its_artifacts_cannot_be_measured(llmc: Command, artifact: Path) -> None:
    done = llmc("eval", artifact, "--reference", speaking_model(), "--per-layer", "--max-tokens", "64")
    assert done.returncode == 3 and "LAYERS_UNSUPPORTED" in done.stderr


def test_without_the_plugin_its_artifact_is_refused(artifact: Path) -> None:
    code = "from llmc.compiler.cli.main import main; main(prog_name='llmc')"
    command = [sys.executable, "-c", code, "run", str(artifact), "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=artifact.parent)
    assert done.returncode == 3 and "TARGET_UNKNOWN" in done.stderr
