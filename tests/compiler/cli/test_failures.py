"""Errors of a command: one paragraph, the exit status of the error's class, no traceback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import click
import onnx
import pytest
from compiled import artifact as compiled
from onnx import TensorProto, helper
from speaking import write_speaking

from llmc.compiler.cli.failures import as_llmc_error, with_flags
from llmc.compiler.cli.main import main
from llmc.errors import CheckFailedError, CompilerError, LlmcError, UsageError

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking(tmp_path_factory.mktemp("run") / "out")


def flat(text: str) -> str:
    """Return the text of an error as one line, without the lines of phases."""
    return " ".join(" ".join(line for line in text.splitlines() if not line.startswith("llmc: ")).split())


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0. Give a whole number, 1 or more."),
        (["--temperature", "-1"], "--temperature is -1.0. Give a number, 0 or more."),
        (["--top-p", "7"], "--top-p is 7.0."),
        (["--top-k", "-2"], "--top-k is -2."),
        (["--min-p", "2"], "--min-p is 2.0."),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0."),
        (["--seed", "-1"], "--seed is -1."),
        (["--stop", ""], "--stop is ('',)."),
    ],
)
def test_a_bad_option_names_its_flag_and_exits_2(llmc: Run, artifact: Path, options: list[str], said: str) -> None:
    done = llmc("run", artifact, "w3", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert flat(done.stderr).startswith(f"SAMPLING_INVALID: {said}")


def test_with_json_an_error_is_also_a_document(llmc: Run, artifact: Path) -> None:
    done = llmc("run", artifact, "w3", "--top-p", "7", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == {
        "code": "SAMPLING_INVALID",
        "what": "--top-p is 7.0.",
        "hint": "Give a number, above 0 and at most 1.",
    }
    assert flat(done.stderr).startswith("SAMPLING_INVALID: --top-p is 7.0.")


@pytest.mark.parametrize(
    ("verb", "given", "shown"),
    [
        ("run", "max_tokens is 0.", "--max-tokens is 0."),
        ("run", "It must be 0 to max_tokens.", "It must be 0 to --max-tokens."),
        ("compile", "Raise_share is 2.", "--raise is 2."),
        ("compile", "algo is 'x'.", "--algo is 'x'."),
        ("compile", "The algo is 'x'.", "The algo is 'x'."),
        ("run", "my_max_tokens and max_tokens_2 and --max_tokens", "my_max_tokens and max_tokens_2 and --max_tokens"),
        ("plan", "max_tokens is 0.", "max_tokens is 0."),
    ],
)
def test_parameters_are_shown_as_flags_of_their_command(verb: str, given: str, shown: str) -> None:
    command = main.commands[verb]
    parameters = command.get_params(click.Context(command))
    assert with_flags(UsageError("X", given, given), parameters).what == shown


def test_only_the_hint_of_other_errors_names_flags() -> None:
    error = with_flags(LlmcError("X", "max_tokens is set.", "Lower max_tokens."), main.commands["run"].params)
    assert (error.what, error.hint) == ("max_tokens is set.", "Lower --max-tokens.")


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_a_prompt_that_is_not_utf8(llmc: Run, options: list[str]) -> None:
    done = llmc("run", compiled("speaking"), os.fsdecode(b"a\xff"), *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert flat(done.stderr).startswith("PROMPT_NOT_UTF8: The prompt holds '\\udcff' at character ")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8:surrogateescape"])
def test_stdin_that_is_not_utf8(encoding: str) -> None:
    code = "from llmc.compiler.cli.main import main; main(prog_name='llmc')"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", compiled("speaking")],
        input=b"a\xffb",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"PROMPT_NOT_UTF8: The prompt ")


# Exceptions of libraries and the system ------------------------------------------------------------------------------

RAISING = """
import builtins, sys
from llmc.runtimes.artifact import open
def fail(folder):
    {statement}
open.read_manifest = fail
from llmc.compiler.cli.main import main
main(["bench", "DIR", *sys.argv[1:]], prog_name="llmc")
"""


def bench_that(statement: str, *arguments: str, **environment: str) -> CompletedProcess[str]:
    """Run `llmc bench` in a process where reading the manifest runs a statement."""
    code = RAISING.format(statement=statement)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize(
    ("statement", "status", "said"),
    [
        ("raise MemoryError", 3, "OUT_OF_MEMORY: The machine has too little memory: no message."),
        ("raise RuntimeError('[enforce fail] can\\'t allocate memory: 9')", 3, "OUT_OF_MEMORY: "),
        ("raise OSError(28, 'No space left on device')", 3, "DISK_FULL: The disk is full."),
        ("builtins.open('/nonesuch')", 3, "FILE_UNUSABLE: '/nonesuch' can't be used: No such file or directory."),
        ("1 / 0", 4, "INTERNAL_ERROR: ZeroDivisionError: division by zero (raised at <string>:5"),
        ("raise RuntimeError('first\\nsecond')", 4, "INTERNAL_ERROR: RuntimeError: first (raised at "),
        ("import nonesuch", 4, "INTERNAL_ERROR: ModuleNotFoundError: No module named 'nonesuch'"),
        ("raise ImportError('no GLIBC', name='torch._C')", 3, "EXTRA_MISSING: The module torch can't be imported: no"),
        ("raise KeyboardInterrupt", 130, "Interrupted."),
    ],
)
def test_any_exception_is_one_paragraph(statement: str, status: int, said: str) -> None:
    done = bench_that(statement)
    assert (done.returncode, done.stdout) == (status, "")
    assert flat(done.stderr).startswith(said)
    assert "Traceback" not in done.stderr and "\n\n" not in done.stderr


def test_an_internal_error_names_its_place_and_the_variable_for_a_traceback() -> None:
    done = bench_that("1 / 0", "--output-format", "json")
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "INTERNAL_ERROR" and "LLMC_TRACEBACK=1" in error["hint"]
    assert "compiler/cli/bench.py:" in error["what"]
    assert "second" not in bench_that("raise RuntimeError('first\\nsecond')").stderr


def test_the_traceback_is_shown_on_request() -> None:
    done = bench_that("1 / 0", LLMC_TRACEBACK="1")
    assert done.returncode == 4
    assert flat(done.stderr).startswith("Traceback (most recent call last):")
    assert flat(done.stderr.partition("INTERNAL_ERROR")[2]).startswith(": ZeroDivisionError: division by zero")


def test_a_graph_that_fails_at_run_time(llmc: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(compiled("speaking"), tmp_path / "out")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "inner"
    model.graph.initializer.append(helper.make_tensor("seven", TensorProto.INT64, [3], [1, -1, 7919]))
    model.graph.node.append(helper.make_node("Reshape", ["inner", "seven"], ["logits"]))
    onnx.save(model, folder / "model.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "model.onnx").read_bytes()
    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = llmc("run", folder, "a", "--raw")
    assert (done.returncode, done.stdout) == (3, "")
    said = flat(done.stderr)
    assert said.startswith("GRAPH_FAILED: ONNX Runtime ") and "failed while it ran model.onnx: " in said


# Classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UsageError("X", "W"), CheckFailedError("X", "W"), CompilerError("X", "W")])
def test_an_error_keeps_its_class(error: LlmcError) -> None:
    assert as_llmc_error(error) is error


def test_a_plain_error_gets_the_class_of_its_code() -> None:
    assert type(as_llmc_error(LlmcError("GATE_FAILED", "W", "H"))) is CheckFailedError
    assert type(as_llmc_error(LlmcError("NONESUCH", "W", "H"))) is LlmcError


def test_arguments_are_not_shown_as_flags() -> None:
    assert with_flags(UsageError("X", "seed is 1."), [click.Argument(["seed"])]).what == "seed is 1."
