"""Progress is for somebody who watches, and for nobody else."""

from __future__ import annotations

import io

import pytest

from llmc.compiler.cli.progress import progress
from llmc.compiler.frontend.refusal import quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_phases_are_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("Capturing demo") as now:
        shown = terminal.getvalue()
        with quiet():  # capture turns stderr away
            now("After MatchRope: 60 matches")
            assert "After MatchRope: 60 matches" in terminal.getvalue()
            print("result")
    assert "Capturing demo" in shown
    assert capsys.readouterr().out == "result\n"


def test_a_log_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Capturing demo") as now:
        now("After MatchRope: 60 matches")
    assert capsys.readouterr() == ("", "")
