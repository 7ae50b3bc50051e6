"""`llmc compile`: what it asks of the compiler, what it prints, how it fails."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from artifacts import write
from click.testing import CliRunner, Result
from progress_lines import phases, rest

from llmc import LlmcError
from llmc.compiler import api
from llmc.compiler.cli.main import main
from llmc.passes.quantize.rounding_plan import Grid, Override

REPORT = {
    "seconds": {"capture": 2.25, "lower": 1.0},
    "peak_rss_bytes": {"capture": 400_000_000, "lower": 900_000_000},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the compiler was asked."""
    manifest = write(tmp_path / "made")
    calls: dict[str, Any] = {}

    def compile(model: str, output: Path, *, watch: Any, **options: object) -> object:
        calls.update(model=model, output=output, **options)
        watch("capture", 0, 0)
        watch("lower", 3, 30)
        return types.SimpleNamespace(path=output, manifest=manifest, report=REPORT)

    monkeypatch.setattr(api, "compile", compile, raising=False)
    return calls


def compile(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compile", "demo", "-o", "out", *arguments])


KEPT = [Override("a*", None), Override("b*", None)]
# What is left out is left to the compiler's own defaults.
DEFAULTS = {
    "model": "demo",
    "output": Path("out"),
    "target": "ort",
    "dtype": "fp32",
    "overrides": [],
    "dump_ir": None,
    "verify": True,
    "trust_remote_code": False,
}


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("", {}),
        ("--int8", {"quantize": "int8"}),
        ("--int4 --group-size 64", {"quantize": "int4", "group_size": 64}),
        ("--quantize w8a8", {"quantize": "w8a8"}),
        ("--int4 --quantize int4", {"quantize": "int4"}),
        ("--fp8", {"quantize": "fp8"}),
        ("--int8 --group-size channel --algo rtn", {"quantize": "int8", "group_size": "channel", "algo": "rtn"}),
        ("--int4 --raise 0.2 --ignore a* --ignore b*", {"quantize": "int4", "raise_share": 0.2, "overrides": KEPT}),
        ("--int4 --no-round-prompts", {"quantize": "int4", "round_prompts": False}),
        ("--int4 --max-kl 0.02", {"quantize": "int4", "max_kl": 0.02}),
        (
            "--int4 --calib notes.txt --calib-samples 8 --calib-length 64",
            {"quantize": "int4", "calib": "notes.txt", "calib_samples": 8, "calib_length": 64},
        ),
        ("--dtype bf16 --kv-cache static --max-seq-len 99", {"dtype": "bf16", "kv_cache": "static", "max_seq_len": 99}),
        ("--kv-cache-dtype int8", {"kv_cache_dtype": "int8"}),
        ("--ops standard --dump-ir ir", {"ops": "standard", "dump_ir": Path("ir")}),
        ("--no-verify --trust-remote-code", {"verify": False, "trust_remote_code": True}),
    ],
)
def test_options_reach_the_compiler(asked: dict[str, Any], arguments: str, changed: dict[str, Any]) -> None:
    assert compile(*arguments.split()).exit_code == 0
    assert asked == DEFAULTS | changed


def test_a_recipe_and_what_the_command_line_says_otherwise(asked: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    weights = [{"name": "*.down*", "scheme": "int8"}]
    recipe.write_text(json.dumps({"quantize": "int4", "algo": "awq", "weights": weights}))
    assert compile("--config", str(recipe), "--algo", "gptq", "--ignore", "b*").exit_code == 0
    overrides = [Override("*.down*", Grid("int8")), KEPT[1]]
    assert asked == DEFAULTS | {"quantize": "int4", "algo": "gptq", "overrides": overrides}


def test_float8_on_a_cpu_is_for_checking_and_says_so(asked: dict[str, Any]) -> None:
    assert "for checking" in compile("--fp8").stderr and asked["quantize"] == "fp8"
    assert rest(compile("--int8").stderr) == ""


def test_the_summary(asked: dict[str, Any]) -> None:
    result = compile()
    assert rest(result.stderr) == "" and phases(result.stderr) == ["import libraries", "capture", "lower"]
    assert result.stdout.splitlines() == [
        "artifact     out: tiny, ort, int8",
        "weights      rtn (no tokenizer): 12 int8 by channel, 1 as it was",
        "size         7.0 kB in 4 files",
        "gate         passed",
        "time         3.2 s: capture 2.2, lower 1.0",
        "peak memory  900 MB",
        "",
        'To run it: llmc run out "Write two sentences about the sea."',
    ]
    assert "gate         left out (--no-verify)" in compile("--no-verify").stdout


def test_the_summary_says_what_a_limit_of_divergence_came_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = write(tmp_path / "made")
    kept = {"limit": 0.02, "measured": 0.01849, "tokens": 8192, "trials": 5}
    manifest = replace(manifest, quantization=(manifest.quantization or {}) | {"max_kl": kept})
    made = types.SimpleNamespace(path=Path("out"), manifest=manifest, report=REPORT)
    monkeypatch.setattr(api, "compile", lambda *arguments, **options: made)
    (line,) = (line for line in compile("--int4").stdout.splitlines() if line.startswith("divergence"))
    assert "0.018 nats a token over 8,192 tokens" in line and "under 0.02 of 5 artifacts" in line


def test_the_document(asked: dict[str, Any]) -> None:
    document = json.loads(compile("--json").stdout)
    assert (document["path"], document["report"]) == ("out", REPORT)
    assert document["manifest"]["files"]["model.onnx"]["bytes"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--int8 --quantize int4", "choose one of int4, int8"),
        ("--int8 --int4", "choose one of int4, int8"),
        ("--group-size 32", "--group-size is about quantized weights"),
        ("--raise 0.5", "--raise is about quantized weights"),
        ("--ignore a", "--ignore is about quantized weights"),
        ("--int8 --group-size many", "neither a number nor 'channel'"),
        ("--int4 --max-kl 0", "--max-kl"),
        ("--int4 --config nowhere.toml", "does not exist"),
        ("--quantize int3", "'int3' is not one of"),
    ],
)
def test_wrong_usage(asked: dict[str, Any], arguments: str, said: str) -> None:
    result = compile(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert not asked


@pytest.mark.parametrize(("code", "status"), [("GATE_FAILED", 1), ("OUTPUT_EXISTS", 2), ("IR_INVALID", 4)])
def test_a_failed_gate_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, code: str, status: int) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise LlmcError(code, "No.")

    monkeypatch.setattr(api, "compile", fail, raising=False)
    result = compile("--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (status, code)
