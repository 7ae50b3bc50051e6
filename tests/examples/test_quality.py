"""The quality comparison's candidates, pipe, table and plot, without engines."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from batches import forward

import llmc

COMPARE = Path(llmc.__file__).resolve().parent / "examples" / "compare"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(COMPARE))


def test_every_candidate_can_be_made_and_measured():
    from click.testing import CliRunner
    from prepare import RECIPES
    from quality_make import WEIGHT_FILES
    from quality_report import ENGINES
    from quality_variants import CANDIDATES

    from llmc.compiler.cli.compile import compile_

    assert len({candidate.name for candidate in CANDIDATES}) == len(CANDIDATES)
    for engine in {candidate.engine for candidate in CANDIDATES}:
        assert (COMPARE / f"quality_peer_{engine}.py").exists()
        assert engine in RECIPES and engine in WEIGHT_FILES and engine in ENGINES
    for candidate in CANDIDATES:
        # The options are valid, so the command fails only at the missing model.
        result = CliRunner().invoke(compile_, ["/no/such/model", "-o", "out", *candidate.flags])
        assert result.exit_code == 3, f"{candidate.name}: {result.output}"


def test_every_model_has_a_title():
    import source_models
    from quality import TITLES

    assert set(TITLES) == set(source_models.MODELS)


_CHILD = """
import os, sys
import numpy as np
import quality_pipe

class Engine:
    version, vocab_size = "7", 5

    def __init__(self, folder, threads, capacity):
        if folder.name == "broken":
            raise ValueError("no such weights")
        self.short = folder.name == "short"
        print("loading")

    def logits(self, tokens):
        os.write(1, b"C library says hello")
        logits = np.zeros((len(tokens), 5))
        logits[np.arange(len(tokens)), tokens] = np.arange(len(tokens)) + 1
        return logits[1:] if self.short else logits

quality_pipe.serve(Engine)
"""


def _command(tmp_path: Path, folder: str) -> list[str]:
    script = tmp_path / "child.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(COMPARE)!r})\n{_CHILD}")
    return [sys.executable, str(script), folder, "--threads=1", "--capacity=8"]


def test_the_pipe_returns_the_logits_of_each_token(tmp_path):
    from quality_pipe import PipedEngine

    start = np.zeros(1, np.int64)
    with PipedEngine(_command(tmp_path, "whole"), 8) as engine:
        engine.open_slots(1)
        assert (engine.version, engine.spec.vocab_size, engine.spec.max_seq_len) == ("7", 5, 8)
        for tokens in ([4, 0, 2], [1]):
            logits = forward(engine, np.array([tokens]), start)
            assert logits.dtype == np.float32 and logits.shape == (1, len(tokens), 5)
            assert logits[0].argmax(1).tolist() == tokens
            assert logits[0].max(1).tolist() == [*range(1, len(tokens) + 1)]


@pytest.mark.parametrize(
    ("folder", "message"), [("broken", "no such weights"), ("short", r"logits \(2, 5\) for 3 tokens")]
)
def test_the_error_of_a_failed_child_is_reported(tmp_path, folder, message):
    from quality_pipe import PipedEngine

    with pytest.raises(RuntimeError, match=message), PipedEngine(_command(tmp_path, folder), 8) as engine:
        forward(engine, np.array([[1, 2, 3]]), np.zeros(1, np.int64))


@pytest.mark.parametrize(("count", "start"), [(1, 1), (2, 0)])
def test_calls_that_the_pipe_does_not_support_are_refused(tmp_path, count, start):
    from quality_pipe import PipedEngine

    with PipedEngine(_command(tmp_path, "whole"), 8) as engine, pytest.raises(RuntimeError, match="whole sequences"):
        forward(engine, np.ones((count, 1), np.int64), np.full(count, start))


def _rows():
    from cost import Cost
    from quality_report import Row
    from quality_variants import Candidate

    evaluation = {
        "perplexity": {"value": 25.494, "stderr": 1.21},
        "ratio": {"value": 1.00312, "stderr": None},
        "kld": {"mean": 0.004512, "stderr": 0.00012, "p99": 0.0221},
        "same_top1": {"value": 0.96311, "stderr": 0.002},
    }
    rounds = [{"tg": [100, 10, 20], "pp": [500]}, {"tg": [30], "pp": [700]}, {"tg": [40], "pp": [600]}]
    return [
        Row(Candidate("genai", "nf4", 4), failed="no | here"),
        Row(Candidate("llama", "Q8_0", 8), 144_810_112, 8.614, Cost(3.6, 849_154_048, True), evaluation, rounds),
        Row(Candidate("llmc", "int4", 4), 90_000_000, 5.15, Cost(20.2, 1_000_000, False)),
    ]


def _cells(text: str) -> list[list[str]]:
    return [
        [cell.strip().replace("\\", "|") for cell in line.replace("\\|", "\\").split("|")[1:-1]]
        for line in text.splitlines()
    ]


def test_the_table_starts_with_the_smallest_and_has_reasons_of_failures():
    from quality_report import table

    head, rule, *lines = _cells(table(_rows(), 512, 128))
    assert head[-1] == "failed" and {len(line) for line in (rule, *lines)} == {len(head)}
    assert lines[0] == ["llmc", "int4", "90", "5.15", *[""] * 7, "~20", "1", ""]
    assert lines[1] == [
        "llama.cpp", "Q8_0", "145", "8.61", "25.49 ± 1", "1.0031", "0.00451 ± 0.0001", "0.0221", "0.9631 ± 0.002",
        "30", "600", "4", "849", "",
    ]  # fmt: skip
    assert lines[2] == ["onnxruntime-genai", "nf4", *[""] * 11, "no | here"]


def test_a_speed_measured_for_another_candidate_is_in_parentheses():
    from quality_report import table

    row = _rows()[1]
    row.timed_as = "Q4_0"
    (_, _, line) = _cells(table([row], 512, 128))
    assert line[9:11] == ["(30)", "(600)"]


def test_a_table_without_failures_has_no_column_for_reasons():
    from quality_report import table

    head, rule, *lines = _cells(table(_rows()[1:], 512, 128))
    assert head[-1] == "with peak MB" and {len(line) for line in (rule, *lines)} == {len(head)}


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("Traceback\n  line\nTypeError: x\n\nfailed with status 1: python a b", "TypeError: x"),
        ("failed with status 1: python", "failed with status 1: python"),
        ("", "RuntimeError"),
        ("x" * 500, "x" * 160 + "…"),
    ],
)
def test_a_reason_is_one_line(output, reason):
    from quality_report import reason_of

    assert reason_of(RuntimeError(output)) == reason


def _points():
    from quality_plot import Point

    points = [
        ("a", "Q8_0", 145, 0.0045),
        ("b", "int8 <x>", 146, 0.0046),
        ("b", "i4", 90, 0.4),
        ("a", "exact", 200, 0.0),
    ]
    return [Point(group, label, int(size * 1e6), kld, None) for group, label, size, kld in points]


def _drawn(points):
    from quality_plot import svg

    root = ElementTree.fromstring(svg(points, "model & co", "note"))
    kind = "{http://www.w3.org/2000/svg}"
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{kind}circle")]
    return dots[-len(points) :], [text.text for text in root.iter(f"{kind}text")]


def test_larger_models_are_further_right_and_smaller_divergences_lower():
    dots, texts = _drawn(_points())
    (eight, other, four, exact) = dots
    assert four[0] < eight[0] < other[0] < exact[0]
    assert four[1] < other[1] < eight[1] < exact[1] == 500
    assert {"Q8_0", "int8 <x>", "i4", "exact", "0.001", "0.01", "0.1", "1", "model & co"} <= set(texts)
    # The axis is logarithmic: 0.1, 0.01 and 0.001 are equally spaced.
    from quality_plot import Point

    levels = [Point("a", "x", 10**8, kld, None) for kld in (0.1, 0.01, 0.001)]
    (_, high), (_, middle), (_, low) = _drawn(levels)[0]
    assert low - middle == pytest.approx(middle - high, abs=0.2) and low - middle > 50


@pytest.mark.parametrize("index", [0, 3])
def test_a_single_point_is_drawn(index):
    ((x, y),), _ = _drawn([_points()[index]])
    assert 64 <= x <= 850 and 92 <= y <= 500


def test_an_error_bar_has_the_length_of_the_error():
    from quality_plot import Point, svg

    text = svg([Point("a", "x", 10**8, 0.1, 0.09), Point("a", "y", 10**8, 1.0, None)], "", "")
    (line,) = [part for part in text.splitlines() if 'stroke="#4878b0"' in part]
    top, bottom = (float(part) for part in line.split('d="M')[1].split('"')[0].split(" ")[1].split("V"))
    assert bottom == 500 and 500 - top == pytest.approx(408 * np.log10(1.9), abs=0.2)


def test_labels_do_not_overlap():
    from quality_plot import Box, place_labels

    dots = [(300.0, 300.0), (306.0, 302.0), (300.0, 310.0), (840.0, 200.0), (66.0, 95.0)]
    boxes = place_labels(dots, ["int8-rtn", "int8", "w8a8", "int8-channel", "left"])
    marks = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    for i, box in enumerate(boxes):
        assert not any(box.overlap(other) for other in (*boxes[:i], *marks))
        assert box.left >= 64 and box.right <= 880 and box.top >= 92
