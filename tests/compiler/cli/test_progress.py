"""Progress is for somebody who watches, and for nobody else."""

from __future__ import annotations

import io
import re

import pytest

from llmc.compiler.cli.progress import progress, steps
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


def test_steps_are_counted_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")

    def shown_now() -> str:
        import time

        before = len(terminal.getvalue())
        time.sleep(0.3)  # it is drawn ten times a second
        return terminal.getvalue()[before:]

    with steps("Capturing demo") as watch:
        assert "Capturing demo" in shown_now()
        watch("quantize", 7, 30)
        drawn = shown_now()
        assert "quantize" in drawn and "7/30" in drawn and "left" in drawn
        assert re.search(r"peak \d+(\.\d)? [MG]B", drawn)
        watch("verify", 0, 0)
        drawn = shown_now()
        assert "verify" in drawn and "/30" not in drawn


def test_a_log_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Capturing demo") as now:
        now("After MatchRope: 60 matches")
    with steps("Capturing demo") as watch:
        watch("quantize", 7, 30)
    assert capsys.readouterr() == ("", "")
