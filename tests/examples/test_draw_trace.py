"""The picture of a trace: boxes to scale, the chosen steps, and their requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from fake_engines import TimedEngine, hashed

import llmc
from llmc.runtimes.measure.trace import Recorder
from llmc.runtimes.measure.workload import Arrival, serve_workload

SPACE = "{http://www.w3.org/2000/svg}"
# Steps: the first two prompts (15 ms); a token of both (12 ms); a token of both (12 ms), after which the second one
# ends; a token of the first one with the third prompt (14 ms); a token of both (12 ms).
ARRIVALS = [Arrival([1, 2, 3], 5), Arrival([4, 5], 3), Arrival([6, 7, 8], 2, 0.02)]


@pytest.fixture
def draw_trace(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(llmc.__file__).resolve().parent / "examples"))
    import draw_trace

    return draw_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    engine = TimedEngine(hashed())
    recorder = Recorder(engine.clock)
    serve_workload(engine, ARRIVALS, 2, recorder=recorder, clock=engine.clock, sleep=engine.sleep)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(recorder.document()))
    return path


def boxes(picture: str) -> dict[str, list[tuple[float, float]]]:
    """Return the boxes of each row by its label: left and right edge."""
    root = ElementTree.fromstring(picture)
    rows = {float(t.attrib["y"]) - 15.5: str(t.text) for t in root if t.attrib.get("text-anchor") == "end"}
    found: dict[str, list[tuple[float, float]]] = {}
    for box in root.iter(f"{SPACE}rect"):
        row = rows.get(float(box.attrib.get("y", -1)))
        if row is not None:
            left = float(box.attrib["x"])
            found.setdefault(row, []).append((left, left + float(box.attrib["width"])))
    return found


def test_boxes_are_to_scale(draw_trace: ModuleType, trace: Path) -> None:
    picture = draw_trace.svg(draw_trace.read(trace), 2, first=2)  # 12 and 14 ms
    unit = (draw_trace.RIGHT - draw_trace.LEFT) / 26
    left, middle, right = draw_trace.LEFT, draw_trace.LEFT + 12 * unit, draw_trace.RIGHT
    both = [pytest.approx((left, middle), abs=0.01), pytest.approx((middle, right), abs=0.01)]
    assert boxes(picture) == {
        "steps": both,
        "calls": both,
        "request 0": both,
        "request 1": both[:1],
        "request 2": both,  # it waits, and then its prompt is computed
    }
    root = ElementTree.fromstring(picture)
    texts = [text.text for text in root.iter(f"{SPACE}text")]
    assert "step: 1 decoding sequence, 3 prompt tokens, 14 ms" in texts
    assert "forward: 2 sequences, 2 tokens, 1 run, 12 ms" in texts
    assert {"waiting", "prompt: 3 tokens", "forward 26 ms"} <= {*texts}
    (dot,) = root.iter(f"{SPACE}circle")
    assert middle - 10 < float(dot.attrib["cx"]) < middle


def test_ticks_are_at_their_times(draw_trace: ModuleType, trace: Path) -> None:
    root = ElementTree.fromstring(draw_trace.svg(draw_trace.read(trace), 2, first=2))
    found = {t.text: float(t.attrib["x"]) for t in root.iter(f"{SPACE}text") if (t.text or "").isdigit()}
    unit = (draw_trace.RIGHT - draw_trace.LEFT) / 26
    assert {"0", "5", "25"} <= {*found}
    assert all(found[text] == pytest.approx(draw_trace.LEFT + int(text) * unit, abs=0.1) for text in found)


def test_the_steps_that_show_most(draw_trace: ModuleType, trace: Path) -> None:
    slices = draw_trace.read(trace)
    assert "steps 2 to 4 of" in draw_trace.svg(slices, 3)
    assert ">step 3 of" in draw_trace.svg(slices, 1)
    assert "steps 0 to 4 of" in draw_trace.svg(slices, 99)
    # Before the step with a prompt, one in which sequences only decode.
    loads = [{"decoding": decoding, "prompt_tokens": prompt} for decoding, prompt in ((0, 9), (2, 0), (3, 5), (4, 5))]
    assert draw_trace.choose([draw_trace.Slice("steps", "step", 0, 1, load) for load in loads], 2) == 1
    with pytest.raises(SystemExit, match="has 5 steps"):
        draw_trace.svg(slices, 1, first=5)


def test_runs_have_a_row_if_the_engine_reports_them(draw_trace: ModuleType, trace: Path) -> None:
    slices = draw_trace.read(trace)
    step = next(one for one in slices if one.name == "step")
    run = draw_trace.Slice("steps", "run", step.began, step.ended, {"sequences": 2, "tokens_per_sequence": [3, 2]})
    assert "runs" not in boxes(draw_trace.svg(slices, 1, first=0))
    picture = draw_trace.svg([*slices, run], 1, first=0)
    assert boxes(picture)["runs"] == boxes(picture)["steps"]
    assert "run: 5 tokens of 2 sequences, 15 ms" in picture


def test_the_command(draw_trace: ModuleType, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "step.svg"
    monkeypatch.setattr(sys, "argv", ["draw_trace.py", str(trace), "--steps", "2", "-o", str(output)])
    draw_trace.main()
    assert output.read_text() == draw_trace.svg(draw_trace.read(trace), 2)
