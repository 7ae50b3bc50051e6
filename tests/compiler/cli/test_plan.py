"""`llmc plan`: its output and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from click.testing import CliRunner, Result
from progress_lines import phases, rest
from zoo.tiny import tiny_model

from llmc.compiler.cli.main import main


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_stdout_is_only_the_document(llmc: Callable[..., CompletedProcess[str]], llama: str) -> None:
    done = llmc("plan", llama, "--json", "--max-seq-len", "32", "--max-batch-size", "4", "--dtype", "bf16")
    assert (done.returncode, rest(done.stderr)) == (0, "")
    assert phases(done.stderr) == [f"capture {llama}", "passes"]
    document = json.loads(done.stdout)
    # Two layers of 2 kv heads, keys and values of 16, 2 bytes each.
    assert document["kv_bytes_per_token"] == 2 * 2 * (16 + 16) * 2
    assert document["kv_bytes"] == 4 * 32 * document["kv_bytes_per_token"]
    assert document["total"]["parameters"] == sum(g["parameters"] for g in document["groups"].values())
    assert document["coverage"]["dialect"]["llmc.rms_norm"] == 5


def test_the_report(llama: str) -> None:
    result = plan(llama, "--max-seq-len", "32", "--max-batch-size", "4")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert result.stdout.isascii()
    assert "positions    32 in 4 sequences" in result.stdout
    for line in ("rms_norm 5", "embedding ", "attention ", "mlp ", "norms ", "head ", "total "):
        assert line in result.stdout
    for line in (
        "memory to compile  ",
        "output             fp32 ",
        "full                 65.5 kB for 4 x 32 positions",
    ):
        assert line in result.stdout


def test_an_8_bit_cache(llama: str) -> None:
    result = plan(llama, "--max-seq-len", "32", "--max-batch-size", "4", "--kv-cache-dtype", "int8")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert "dtype                int8 with scales" in result.stdout
    assert "full                 16.4 kB for 4 x 32 positions" in result.stdout  # 2 x 2 heads x (16 + 16) each


def test_slack_for_drafts(tmp_path: Path) -> None:
    tiny_model("gemma3_text").save_pretrained(tmp_path)  # one of its layers has a window of 6
    result = plan(str(tmp_path), "--max-seq-len", "32", "--spec-tokens", "4")
    assert (result.exit_code, rest(result.stderr)) == (0, "")
    assert "some layers keep at most 10 positions" in result.stdout
    refused = plan(str(tmp_path), "--spec-tokens", "65")
    assert refused.exit_code == 2 and "0 to 64" in refused.stderr


def test_a_refused_model(mamba: str) -> None:
    result = plan(mamba, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == "CAPTURE_SPECIALIZED"
    assert rest(result.stderr).startswith("CAPTURE_SPECIALIZED: MambaForCausalLM computes with a fixed")
