"""`llmc run`: a single answer, a pipe, and a chat on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import speaking
from click.testing import CliRunner, Result
from speaking import stand_in_load, write_speaking

from llmc.compiler.cli import run as module
from llmc.compiler.cli.main import main


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    stand_in = stand_in_load()
    monkeypatch.setitem(sys.modules, "llmc.runtimes.engines.load", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking(tmp_path_factory.mktemp("run") / "out")


def run(*arguments: str | Path, typed: str = "") -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments)], input=typed)


def test_stdout_is_only_the_answer(loaded: types.ModuleType, artifact: Path) -> None:
    result = run(artifact, "w3", "--max-tokens", "3", "--threads", "2")
    assert (result.exit_code, result.stdout, result.stderr) == (0, " w4 w5 w6\n", "")
    assert loaded.asked == (artifact, 2, 1)


def test_stats_on_request(loaded: types.ModuleType, artifact: Path) -> None:
    result = run(artifact, "w3", "--max-tokens", "3", "-v")
    assert result.stdout == " w4 w5 w6\n"
    # The chat template adds a token to the prompt.
    assert result.stderr.startswith("[2 + 3 tokens, first after ")
    assert result.stderr.endswith(" tokens/s, ended by length]\n")
    assert "ended by stop" in run(artifact, "w3", "-v").stderr


def test_a_prompt_from_a_pipe(loaded: types.ModuleType, artifact: Path) -> None:
    assert run(artifact, "--stop", "w7", typed="w1\nw3\n").stdout == " w4 w5 w6 \n"
    seen: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.ChatSession, "answer", lambda self, prompt: seen.append(prompt))
        run(artifact, "--raw", typed="w1\nw3\n")
    assert seen == ["w1\nw3"]  # the line break at the end of a shell's echo is removed
    result = run(artifact, "--raw", typed="")
    assert (result.exit_code, result.stderr.split(":")[0]) == (2, "PROMPT_EMPTY")


def test_a_chat_template_is_used_if_there_is_one(loaded: types.ModuleType, artifact: Path, tmp_path: Path) -> None:
    def prompt_tokens(folder: Path, *arguments: str) -> int:
        return json.loads(run(folder, "w3", "--json", *arguments).stdout)["stats"]["prompt_tokens"]

    raw = write_speaking(tmp_path / "raw", chat=False)
    assert [prompt_tokens(artifact), prompt_tokens(artifact, "--raw"), prompt_tokens(raw)] == [2, 1, 1]
    result = run(raw, "w3", "--chat")
    assert (result.exit_code, result.stderr.split(":")[0]) == (3, "CHAT_TEMPLATE_MISSING")


def test_json_is_one_document(loaded: types.ModuleType, artifact: Path) -> None:
    result = run(artifact, "w3", "--max-tokens", "2", "--json")
    document = json.loads(result.stdout)
    assert (document["text"], document["token_ids"], document["finish_reason"]) == (" w4 w5", [4, 5], "length")
    assert document["stats"]["completion_tokens"] == 2


def test_every_option_reaches_the_sampler(
    loaded: types.ModuleType, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(module.ChatSession, "answer", lambda self, prompt: seen.append(self.params))
    given = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2}
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert run(artifact, "w3", *options, "--seed", "5", "--stop", "a", "--stop", "b").exit_code == 0
    assert {name: getattr(seen[0], name) for name in given} == given
    assert (seen[0].seed, tuple(seen[0].stop)) == (5, ("a", "b"))


def test_invalid_options(artifact: Path, loaded: types.ModuleType) -> None:
    result = run(artifact, "w3", "--top-p", "7", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["code"] == "SAMPLING_INVALID"


# A terminal ---------------------------------------------------------------------------------------------------------


class Terminal:
    """`llmc run DIR` on a terminal of its own."""

    def __init__(self, artifact: Path, *arguments: str, delay: float = 0.0) -> None:
        import pty

        self.mine, theirs = pty.openpty()
        command = [sys.executable, speaking.__file__, str(delay), "run", str(artifact), *arguments]
        # A session with this as its terminal, so that Ctrl-C is a signal.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_SESSION, *command], stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Wait for `text`; return the output up to its end."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.mine], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.mine, 4096).decode()
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.mine, text.encode())

    def interrupt_prompt(self) -> None:
        """Press Ctrl-C until a new prompt appears.

        A signal between the prompt and the read does not interrupt the read.
        """
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for("> ", seconds=3)
                return
        pytest.fail("no new prompt after Ctrl-C")


_IN_SESSION = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.environ["TERM"] = "dumb"
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.mine)


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_conversation(artifact: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(artifact, "--max-tokens", "2"))
    assert "/reset" in terminal.wait_for("> ")
    terminal.type("w3\n")
    assert "w4 w5" in terminal.wait_for("> ")
    terminal.type("w7\n")
    # The template adds a token to each of three messages: w3, the answer of two tokens, w7. (1+1) + (1+2) + (1+1) = 7.
    assert "[7 + 2 tokens" in terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("> ")
    terminal.type("w7\n")
    assert "[2 + 2 tokens" in terminal.wait_for("> ")
    terminal.type("w1 " * 70 + "\n")
    assert "PROMPT_TOO_LONG" in terminal.wait_for("> ")
    terminal.type("w7\n")  # the refused prompt is not in the history
    assert "[7 + 2 tokens" in terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(timeout=30) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(artifact: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(artifact, "--max-tokens", "60", delay=0.3))
    terminal.wait_for("> ")
    terminal.type("w1\n")
    terminal.wait_for("w3")
    terminal.type("\x03")
    assert "w17" not in terminal.wait_for("> ")
    terminal.interrupt_prompt()  # a new line; the program does not end
    terminal.type("w17\n")
    terminal.wait_for("w18")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_ctrl_c_ends_a_single_answer(artifact: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(artifact, "w1", delay=0.2))
    terminal.wait_for("w3")
    terminal.type("\x03")
    assert "\nInterrupted." in terminal.wait_for("Interrupted.").replace("\r", "")
    assert terminal.process.wait(timeout=30) == 128 + signal.SIGINT


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_json_is_refused_for_a_chat(artifact: Path, terminals: list[Terminal]) -> None:
    terminals.append(terminal := Terminal(artifact, "--json"))
    terminal.wait_for("give a PROMPT")
    assert terminal.process.wait(timeout=30) == 2
