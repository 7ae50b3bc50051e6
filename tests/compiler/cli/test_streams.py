"""Standard streams that are full, closed, or can't encode a character."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from speaking import write_speaking

COMMAND = [sys.executable, "-c", "from llmc.compiler.cli.main import main; main(prog_name='llmc')"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_speaking(tmp_path_factory.mktemp("streams") / "out"))


def commands(artifact: str) -> list[list[str]]:
    return [["inspect", artifact], ["inspect", artifact, "--json"], ["--help"], ["compile", "--help"], ["--version"]]


@needs_full
def test_a_full_stdout_is_one_line(artifact: str) -> None:
    for arguments in commands(artifact):
        with FULL.open("w") as full:
            done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 3
        assert done.stderr == (
            "STDOUT_FAILED: The output can't be written: No space left on device. Redirect it to another place.\n"
        )


@needs_full
def test_a_full_stderr_has_an_exit_status(artifact: str) -> None:
    for arguments in (["run", artifact, "w3", "--top-p", "7"], ["run"]):
        with FULL.open("w") as full:
            done = subprocess.run([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=full, text=True)
        assert (done.returncode, done.stdout) == (3, "")


def test_a_closed_pipe_ends_quietly(artifact: str) -> None:
    for arguments in commands(artifact):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, ""), arguments


def test_closed_streams_are_no_error(artifact: str) -> None:
    shell = '"$@" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, "sh", *COMMAND, "inspect", artifact])
    assert done.returncode == 0
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *COMMAND, "run", artifact, "--raw"], capture_output=True, text=True
    )
    assert done.returncode != 1 and "Traceback" not in done.stderr


def test_characters_that_an_output_cannot_encode_are_escaped() -> None:
    code = "import click, sys; from llmc.compiler.cli.streams import prepare_streams; prepare_streams();"
    code += "click.echo('ü€', file=sys.stdout)"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.decode("latin-1") == "ü\\u20ac\n"


def test_output_arrives_in_order_and_complete() -> None:
    code = "import sys; from llmc.compiler.cli.streams import prepare_streams; print('a'); prepare_streams();"
    code += "print('b' * 100_000); prepare_streams(); print('c')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "a\n" + "b" * 100_000 + "\nc\n"
