"""The plot shows the measured values to scale."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from llmc.runtimes.measure.evaluate import Evaluation, Scores, summarise
from llmc.runtimes.measure.evaluation_plot import svg

SPACE = "{http://www.w3.org/2000/svg}"


def evaluation(kld: np.ndarray, position: np.ndarray | None = None) -> Evaluation:
    blocks = np.arange(len(kld))
    ones = np.ones(len(kld))
    position = 1 + blocks if position is None else position
    return summarise(Scores(blocks, position, 1.1 * ones, ones, kld, np.arange(len(kld)) % 4))


def draw(result: Evaluation) -> tuple[ElementTree.Element, list[str]]:
    root = ElementTree.fromstring(svg(result, "demo <int4> & more"))
    return root, [text.text or "" for text in root.iter(f"{SPACE}text")]


def bars(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Return x and height of each bar, without the background."""
    found = [(r.attrib["x"], r.attrib["height"]) for r in root.iter(f"{SPACE}rect") if "x" in r.attrib]
    return [(float(x), float(height)) for x, height in found]


def test_sorted_divergences_on_a_logarithmic_scale() -> None:
    root, texts = draw(evaluation(10 ** np.linspace(-4, 0, 1001)[::-1]))
    assert texts[0] == "demo <int4> & more"
    assert {"0.0001", "0.001", "0.01", "0.1", "1", "median 0.01", "p90 0.4", "p99 0.91"} <= set(texts)
    (line,) = [p.attrib["d"] for p in root.iter(f"{SPACE}path") if "stroke-width" in p.attrib]
    points = np.array(re.findall(r"([\d.]+) ([\d.]+)", line), float)
    # The divergences are spread evenly over the powers of ten: a straight line from corner to corner.
    assert (points[0] == [64, 298]).all() and (points[-1] == [414, 92]).all()
    assert np.abs(points[:, 1] - np.interp(points[:, 0], [64, 414], [298, 92])).max() < 0.2


def test_bars_by_position_begin_at_zero() -> None:
    position = np.repeat(np.arange(160), 2)
    root, texts = draw(evaluation(np.where(position < 80, 0.1, 0.4), position))
    found = bars(root)
    assert len(found) == 16
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert found[0][1] / found[-1][1] == pytest.approx(0.25, abs=0.01)
    assert {"0", "80", "160", "0.1", "0.2", "0.3", "0.4"} <= set(texts)


def test_the_summary_line() -> None:
    _, texts = draw(evaluation(np.full(40, 0.25)))
    assert texts[-1] == (
        "40 tokens: mean 0.25 ± 0, largest 0.25; perplexity 3.004, 1.1052 of the reference's; same best token 25.0%"
    )


@pytest.mark.parametrize("kld", [[0.0], [0.0, 0.0], [0.0, 1e-30, 5.0], [1.0], [0.1, 1.0], [3e-9, 3e-9]])
def test_everything_is_inside_its_panel(kld: list[float]) -> None:
    root, _ = draw(evaluation(np.array(kld)))
    heights = [height for _, height in bars(root)]
    assert all(0 <= height <= 206 for height in heights)
    for path in root.iter(f"{SPACE}path"):
        assert all(92 <= float(y) <= 298 for y in re.findall(r" ([\d.]+)", path.attrib["d"]))
    for circle in root.iter(f"{SPACE}circle"):
        assert 92 <= float(circle.attrib["cy"]) <= 298
