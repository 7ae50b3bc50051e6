"""`llmc inspect` of an artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from artifacts import manifest, write
from click.testing import CliRunner, Result
from progress_lines import rest
from speaking import write_speaking

from llmc.compiler.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_speaking(tmp_path / "out")


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_the_report(folder: Path) -> None:
    result = inspect(folder)
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout
    for line in (
        "model         tiny (llama), 1,234 parameters, 1 layers",
        "quantization  rtn: 12 int8 by channel, 1 as it was",
        "note          no tokenizer",
        "needs         numpy>=1.26",
        "step   1 or more",
        # 3 heads of 64 and 32, 128 positions, 4 bytes each
        "     1  static        128      3  64 and 32      fp32   147 kB",
        "prefill of 7  1.25e-06  0.0001  yes",
    ):
        assert f"\n{line}\n" in f"\n{text}"
    assert any(line.startswith("model.onnx ") and " 5 B" in line for line in text.splitlines())


def test_a_quantized_cache(tmp_path: Path) -> None:
    cache = manifest().caches[0]
    write(tmp_path / "out", caches=[replace(cache, dtype="int8")] * 2)
    text = inspect(tmp_path / "out").stdout
    # 3 heads of 64 and 32 bytes and two scales of 4, 128 positions, two layers
    assert "\nCaches of one sequence, 79.9 kB\n" in text
    assert "     2  static        128      3  64 and 32      int8 with a scale per token  79.9 kB" in text
    assert json.loads(inspect(tmp_path / "out", "--json").stdout)["cache_bytes"] == 2 * 3 * (64 + 32 + 8) * 128


def test_a_ring_with_slack(tmp_path: Path) -> None:
    cache = replace(manifest().caches[0], kind="ring", length=9)
    write(tmp_path / "out", caches=[cache, replace(cache, slack=3)])
    lines = [line.split()[:4] for line in inspect(tmp_path / "out").stdout.splitlines() if " ring " in line]
    assert lines == [["1", "ring", "9", "3"], ["1", "ring", "6", "+"]]


def test_the_document(folder: Path) -> None:
    document = json.loads(inspect(folder, "--json").stdout)
    assert document["files"]["model.onnx"]["bytes"] == 5
    assert document["bytes"] == sum(file["bytes"] for file in document["files"].values())
    assert document["cache_bytes"] == 3 * (64 + 32) * 128 * 4
    assert document["verify"]["passed"] is True
    assert "error" not in document


def test_a_damaged_artifact_is_shown_and_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")
    result = inspect(folder)
    assert result.exit_code == 3
    assert "tiny (llama)" in result.stdout
    assert result.stderr.startswith("ARTIFACT_DAMAGED")
    assert json.loads(inspect(folder, "--json").stdout)["error"]["code"] == "ARTIFACT_DAMAGED"


def test_an_artifact_that_was_not_verified(tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert inspect(tmp_path / "out").stdout.endswith("Verification when it was compiled\nnone\n")
    (tmp_path / "out/verify.json").write_text('{"form": "another"}')
    assert inspect(tmp_path / "out").stdout.endswith('{"form": "another"}\n')


def test_options_of_models_are_wrong_usage(folder: Path) -> None:
    result = inspect(folder, "--until", "canonical")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--until works on a model only" in result.stderr


BARE = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "onnx", "safetensors", "gguf"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Bare())
import speaking
speaking.main()
"""


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["inspect", "--json"], ["run", "w3"], ["run", "w3", "--json"], ["bench", "-p", "8", "-n", "4"]],
)
def test_a_machine_without_torch_inspects_runs_and_benches(folder: Path, arguments: list[str]) -> None:
    verb, *options = arguments
    done = subprocess.run(
        [sys.executable, "-c", BARE, "0", verb, folder, *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, rest(done.stderr)) == (0, "")
    assert done.stdout
