"""Progress: drawn on a terminal, one line per phase in a log."""

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
        with quiet():  # capture redirects stderr
            now("passes", "After MatchRope: 60 matches")
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock of the module; tests set its time."""
    now = [100.0]
    monkeypatch.setattr("llmc.compiler.cli.progress.time.perf_counter", lambda: now[0])
    return now


def test_a_log_gets_a_line_for_each_phase(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("capture demo") as now:
        assert capsys.readouterr().err == "llmc: capture demo ...", "it is visible while the phase runs"
        clock[0] += 8.46
        for name in ("MatchRope", "MatchLinear"):
            now("passes", f"After {name}: 60 matches")
        clock[0] += 2
    assert capsys.readouterr() == ("", " 8.5 s\nllmc: passes ... 2.0 s\n")


def test_a_log_gets_no_line_for_each_step(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with steps("import libraries") as watch:
        watch("quantize", 0, 0)
        for done in range(31):
            watch("calibrate", done, 30)
            clock[0] += 1
        watch("write", 0, 0)
    lines = ["import libraries ... 0.0 s", "quantize ... 0.0 s", "calibrate ... 31.0 s", "write ... 0.0 s"]
    assert capsys.readouterr() == ("", "".join(f"llmc: {line}\n" for line in lines))


def test_a_failed_phase_ends_its_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), steps("capture"):
        raise ZeroDivisionError
    assert capsys.readouterr().err == "llmc: capture ... 0.0 s\n"


def test_lines_reach_stderr_while_it_is_redirected(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with steps("capture") as watch, quiet():
        watch("passes", 0, 0)
        assert capsys.readouterr().err.endswith("llmc: passes ...")
