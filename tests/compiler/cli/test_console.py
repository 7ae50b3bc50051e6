"""Text and tables on a terminal and in a pipe."""

from __future__ import annotations

import io

import pytest

from llmc.compiler.cli import console
from llmc.runtimes.artifact.manifest import Verified


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [["a", 5, "x"], ["longer", 12345, "y"]]


def test_a_pipe_gets_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["name", "n", "why"], ROWS)
    assert capsys.readouterr().out == "name         n  why\na            5  x\nlonger  12,345  y\n"


def test_a_terminal_gets_a_rich_table(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    console.table(["name", "n", "why"], [*ROWS, ["[red]", 1, "markup is text"]])
    assert "\u2500" in terminal.getvalue()
    assert "12,345" in terminal.getvalue()
    assert "[red]" in terminal.getvalue()


def test_values_of_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    console.facts([("a", "1"), ("longer", "2")])
    assert capsys.readouterr().out == "a       1\nlonger  2\n"


def test_a_paragraph_is_wrapped_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    console.paragraph("word " * 10)
    assert capsys.readouterr().out.count("\n") == 1
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    console.paragraph("word " * 10)
    assert all(len(line) <= 20 for line in terminal.getvalue().splitlines())


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_400, "99.4 kB"),
        (269_000_000, "269 MB"),
        (999_600_000, "1.0 GB"),
        (3e15, "3,000.0 TB"),
    ],
)
def test_size(nbytes: float, shown: str) -> None:
    assert console.size(nbytes) == shown


def test_where_an_artifact_passed_the_gate() -> None:
    assert console.gate(Verified()) == "passed"
    assert "the engine follows on each device" in console.gate(Verified("graph", "gate"))
