"""`llmc compile`: the options that reach the compiler, the output, and errors."""

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
from llmc.compiler.config import CompileConfig
from llmc.compiler.targets.registry import all_options, make_config
from llmc.ir.program import Miss, PassRecord
from llmc.ir.stages import Stage
from llmc.passes.quantize.schemes import Grid, Override
from llmc.passes.runner import PassRun
from llmc.runtimes.artifact.manifest import DroppedLayers, MaxKlSpec, PrunedWeights, PruningSpec

REPORT = {
    "seconds": {"capture": 2.25, "lower": 1.0},
    "peak_rss_bytes": {"capture": 400_000_000, "lower": 900_000_000},
}


PASSES = (
    PassRun(
        "prefill",
        PassRecord("FuseAttention", 1, (Miss("its cache is a ring cache", "attend", "layers.0"),), 0.5, Stage.CACHED),
    ),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replace the compiler; return the arguments of its last call."""
    manifest = write(tmp_path / "made")
    calls: dict[str, Any] = {}

    def compile(model: str, output: Path, config: CompileConfig, *, watch: Any, **options: object) -> object:
        calls.update(model=model, output=output, config=config, **options)
        watch("capture", 0, 0)
        watch("lower", 3, 30)
        return types.SimpleNamespace(path=output, manifest=manifest, report=REPORT, passes=PASSES)

    monkeypatch.setattr(api, "compile", compile, raising=False)
    return calls


def compile(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compile", "demo", "-o", "out", *arguments])


KEPT = (Override("a*", None), Override("b*", None))
DEFAULTS = {"model": "demo", "output": Path("out"), "dump_ir": None, "verify": True, "trust_remote_code": False}


@pytest.mark.parametrize(
    ("arguments", "options"),
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
        (
            "--dtype fp32 --kv-cache static --max-seq-len 99",
            {"dtype": "fp32", "kv_cache": "static", "max_seq_len": 99},
        ),
        ("--target ort", {"target": "ort"}),
        ("--kv-cache-dtype int8", {"kv_cache_dtype": "int8"}),
        ("--spec-tokens 3", {"spec_tokens": 3}),
        ("--ops standard", {"ops": "standard"}),
        ("--prune 2:4", {"prune": "2:4"}),
        ("--prune 0.5 --prune-algo wanda --calib f", {"prune": 0.5, "prune_algo": "wanda", "calib": "f"}),
        ("--drop-layers 3 --calib f", {"drop_layers": 3, "calib": "f"}),
    ],
)
def test_options_reach_the_compiler(asked: dict[str, Any], arguments: str, options: dict[str, Any]) -> None:
    result = compile(*arguments.split())
    assert result.exit_code == 0, result.stderr
    assert asked == DEFAULTS | {"config": make_config(**options)}


def test_options_outside_of_the_config_reach_the_compiler(asked: dict[str, Any]) -> None:
    assert compile("--no-verify", "--trust-remote-code", "--dump-ir", "ir").exit_code == 0
    assert (asked["verify"], asked["trust_remote_code"], asked["dump_ir"]) == (False, True, Path("ir"))


def test_every_declared_option_has_a_flag_and_help() -> None:
    text = " ".join(compile("--help").stdout.split())
    for declared in all_options().values():
        assert f"{declared.flag} " in text, declared.name
        assert " ".join(declared.option.help.split())[:40] in text, declared.name


def test_the_command_line_overrides_a_recipe(asked: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    weights = [{"name": "*.down*", "scheme": "int8"}]
    recipe.write_text(json.dumps({"quantize": "int4", "algo": "awq", "weights": weights}))
    assert compile("--config", str(recipe), "--algo", "gptq", "--ignore", "b*").exit_code == 0
    overrides = [Override("*.down*", Grid("int8")), KEPT[1]]
    assert asked["config"] == make_config(quantize="int4", algo="gptq", overrides=overrides)


def test_float8_on_a_cpu_prints_a_warning(asked: dict[str, Any]) -> None:
    assert "for checking" in compile("--fp8").stderr and asked["config"].quantize == "fp8"
    assert rest(compile("--int8").stderr) == ""


def test_the_summary(asked: dict[str, Any]) -> None:
    result = compile()
    assert rest(result.stderr) == "" and phases(result.stderr) == ["import libraries", "capture", "lower"]
    assert result.stdout.splitlines() == [
        "artifact     out: tiny, ort, int8",
        "weights      rtn: 12 int8 by channel, 1 as it was",
        "note         no tokenizer",
        "size         7.0 kB in 4 files",
        "gate         passed",
        "time         3.2 s: capture 2.2, lower 1.0",
        "peak memory  900 MB",
        "",
        'To run it: llmc run out "Write two sentences about the sea."',
    ]
    assert "gate         skipped (--no-verify)" in compile("--no-verify").stdout


def test_the_summary_shows_the_result_of_max_kl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = write(tmp_path / "made")
    kept = MaxKlSpec(limit=0.02, measured=0.01849, tokens=8192, trials=5)
    assert manifest.quantization is not None
    manifest = replace(manifest, quantization=replace(manifest.quantization, max_kl=kept))
    made = types.SimpleNamespace(path=Path("out"), manifest=manifest, report=REPORT, passes=())
    monkeypatch.setattr(api, "compile", lambda *arguments, **options: made)
    (line,) = (line for line in compile("--int4").stdout.splitlines() if line.startswith("divergence"))
    assert "0.018 nats per token over 8,192 tokens" in line and "under 0.02 in 5 trials" in line


def test_the_document(asked: dict[str, Any]) -> None:
    document = json.loads(compile("--json").stdout)
    assert (document["path"], document["report"]["seconds"]) == ("out", REPORT["seconds"])
    (run,) = document["report"]["passes"]
    assert (run["graph"], run["name"], run["matches"]) == ("prefill", "FuseAttention", 1)
    assert run["misses"] == [{"reason": "its cache is a ring cache", "node": "attend", "where": "layers.0"}]
    assert document["manifest"]["files"]["model.onnx"]["bytes"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--int8 --quantize int4", "choose one of int4, int8"),
        ("--int8 --int4", "choose one of int4, int8"),
        ("--group-size 32", "--group-size is set, but weights are not quantized"),
        ("--raise 0.5", "--raise is set, but weights are not quantized"),
        ("--int8 --raise 0.2", "--raise is set, but --quantize is int8"),
        ("--ignore a", "but weights are not quantized"),
        ("--int4 --group-size 7", "--group-size is 7"),
        ("--int8 --group-size many", "--group-size"),
        ("--int4 --raise 2", "'--raise': Give 0 to 1."),
        ("--int4 --max-kl 0", "--max-kl"),
        ("--dtype bf16", "bf16"),
        ("--drop-layers -1", "--drop-layers"),
        ("--prune 2:4 --prune-algo x", "'x' is not one of"),
        ("--int8 --no-round-prompts", "--round-prompts"),
        ("--int4 --config nowhere.toml", "does not exist"),
        ("--quantize int3", "'int3' is not one of"),
    ],
)
def test_wrong_usage(asked: dict[str, Any], arguments: str, said: str) -> None:
    result = compile(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())
    assert not asked


@pytest.mark.parametrize(("code", "status"), [("GATE_FAILED", 1), ("OUTPUT_EXISTS", 2), ("IR_INVALID", 4)])
def test_errors_exit_with_the_status_of_their_class(monkeypatch: pytest.MonkeyPatch, code: str, status: int) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise LlmcError(code, "No.")

    monkeypatch.setattr(api, "compile", fail, raising=False)
    result = compile("--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (status, code)


# Pruning --------------------------------------------------------------------------------------------------------------


def test_a_recipe_may_prune(asked: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"prune": 0.25, "prune_algo": "wanda", "drop_layers": 2, "calib": "f"}')
    result = compile("--config", str(recipe), "--drop-layers", "1")
    assert result.exit_code == 0
    assert asked["config"] == make_config(prune=0.25, prune_algo="wanda", drop_layers=1, calib="f")


def test_a_warning_before_any_work_says_that_zeros_save_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "compile", interrupted)
    assert "saves neither time nor bytes" in compile("--prune", "2:4").stderr
    assert "saves neither" not in compile("--drop-layers", "1").stderr


def test_the_summary_of_a_pruned_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pruning = PruningSpec(DroppedLayers(["layers.3", "layers.5"], {}), PrunedWeights("2:4", "sparsegpt", 0.5, 120, {}))
    manifest = write(tmp_path / "made", quantization=None, pruning=pruning)
    made = types.SimpleNamespace(path=Path("out"), manifest=manifest, report=REPORT, passes=())
    monkeypatch.setattr(api, "compile", lambda *arguments, **options: made)
    line = "pruned       without layers.3, layers.5; 2:4 by sparsegpt: 50.0% zeros in 120 weights\n"
    assert line in compile().stdout
