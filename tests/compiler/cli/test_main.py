"""The command `llmc`: help, exit statuses, and the streams that it writes to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from progress_lines import rest

from llmc import __version__
from llmc.compiler.cli.command import Verb, json_option
from llmc.compiler.cli.main import main


def run(*arguments: str, command: click.Command = main) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_help_and_version() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {verb} " in out for verb in ("bench", "compile", "doctor", "inspect", "plan", "run", "verify"))
    assert run("--version")[:2] == (0, f"llmc, version {__version__}\n")


def test_help_loads_no_library() -> None:
    """Imports are checked instead of time, which depends on the machine."""
    code = "import sys; from llmc.compiler.cli.main import main;"
    code += "[main([verb, '--help'], standalone_mode=False) for verb in main.commands];"
    code += "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'rich', 'numpy', 'gguf'};"
    code += "print({name.partition('.')[0] for name in sys.modules} & heavy)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspct", "demo"], "Did you mean 'inspect'?"),
        (["inspect", "demo", "--jsn"], "Did you mean --json?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["inspect"], "Missing argument 'MODEL'"),
        (["plan", "demo", "--max-seq-len", "0"], "Give 2 or more"),
        (["inspect", "demo", "--until", "lowered"], "'lowered' is not one of"),
    ],
)
def test_wrong_usage_exits_2_with_a_suggestion(arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said.replace("'", "") in err.replace("'", "")  # click's versions quote differently


def test_an_error_is_one_paragraph_on_stderr() -> None:
    code, out, err = run("inspect", "no such model", "--until", "canonical")
    assert (code, out) == (3, "")
    err = rest(err)
    assert err.startswith("MODEL_NOT_FOUND: There is no model at 'no such model'.")
    assert " ".join(err.split()).endswith("a hub id such as org/name, or demo.")
    assert max(map(len, err.splitlines())) <= 100
    assert "\n\n" not in err


def test_with_json_an_error_is_also_a_document() -> None:
    import json

    code, out, err = run("plan", "no such model", "--json")
    assert code == 3
    assert json.loads(out)["error"]["code"] == "MODEL_NOT_FOUND"
    assert rest(err).startswith("MODEL_NOT_FOUND")


@click.command(cls=Verb)
@json_option
def noisy(as_json: bool) -> None:
    import logging
    import warnings

    warnings.warn("chatter", stacklevel=1)
    logging.getLogger("transformers").error("chatter")
    logging.getLogger("torch").warning("chatter")
    click.echo("{}")


def test_libraries_are_silent_only_inside_a_verb(caplog: pytest.LogCaptureFixture) -> None:
    import logging
    import warnings

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert run("--json", command=noisy) == (0, "{}\n", "")
        assert not warned
    assert "chatter" not in caplog.text
    logging.getLogger("transformers").error("afterwards")
    assert "afterwards" in caplog.text


INTERRUPTIBLE = """
import torch, sys
from llmc.compiler.cli.main import main
export = torch.export.export
def tracing(*args, **kwargs):
    print("tracing", flush=True)
    for _ in range(500):  # long enough to be interrupted, and no orphan if that fails
        export(*args, **kwargs)
torch.export.export = tracing
main(["inspect", sys.argv[1]], prog_name="llmc")
"""


def test_ctrl_c_while_capturing_exits_130_with_one_line(llama: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, llama],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "tracing\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, rest(err)) == (130, "", "Interrupted.\n")
