"""A measurement as a drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from llmc.runtimes.measure.bench import BenchResult, Latency, Rate
from llmc.runtimes.measure.bench_plot import svg

SPACE = "{http://www.w3.org/2000/svg}"
RESULT = BenchResult(
    rates=(Rate("pp512", 1481.25, 1400.0, 1500.0), Rate("tg128", 288.0, 280.0, 290.0)),
    ttft_ms=Latency(345.678, 360.0, 365.0),
    tpot_ms=Latency(3.47, 3.6, 4.2),
    repeats=5,
    concurrency=1,
    peak_rss_bytes=312_000_000,
    load_s=0.42,
    threads=2,
)


def test_the_bars_are_to_scale() -> None:
    root = ElementTree.fromstring(svg([("demo <int4> & more", RESULT)]))
    bars = [float(r.attrib["width"]) for r in root.iter(f"{SPACE}rect")][1:]
    assert abs(bars[0] / bars[1] - 1481.25 / 288) < 0.01
    texts = [t.text or "" for t in root.iter(f"{SPACE}text")]
    assert texts[0] == "demo <int4> & more"
    assert {"pp512", "1,481.2", "tg128", "288.0"} <= set(texts)
    assert "first token 345.7 ms (p99 365.0), each next token 3.5 ms (p99 4.2)" in texts
    assert all(float(r.attrib["width"]) <= float(root.attrib["width"]) for r in root.iter(f"{SPACE}rect"))


def test_what_was_not_measured_is_left_out() -> None:
    few = replace(RESULT, ttft_ms=Latency(345.678, None, None))
    assert "first token 345.7 ms, each next token 3.5 ms (p99 4.2)" in svg([("demo", few)])
    half = svg([("x", replace(RESULT, rates=RESULT.rates[1:], ttft_ms=None))])
    assert "tg128" in half and "pp512" not in half and "first token" not in half


def test_bars_of_several_artifacts_are_grouped_by_test() -> None:
    slow = replace(RESULT, rates=(Rate("pp512", 740.625, 700.0, 800.0), Rate("tg128", 144.0, 130.0, 150.0)))
    long_name = "a folder with <a> long name"
    root = ElementTree.fromstring(svg([("first", RESULT), (long_name, slow)]))
    background, *bars = root.iter(f"{SPACE}rect")
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert [width / widths[3] for width in widths] == pytest.approx([10.29, 5.14, 2, 1], abs=0.01)
    right = float(background.attrib["width"]) - 150  # the numbers are beside the bars
    assert all(float(bar.attrib["x"]) + width < right for bar, width in zip(bars, widths, strict=True))
    assert [bar.attrib["fill"] == bars[0].attrib["fill"] for bar in bars] == [True, False, True, False]
    texts = {text.text: text for text in root.iter(f"{SPACE}text")}
    labels = ["pp512", "first", long_name, "tg128", "first", long_name]
    assert [text.text for text in root.iter(f"{SPACE}text") if text.text in labels] == labels
    # The bars begin after the longest name.
    assert float(texts[long_name].attrib["x"]) > 7 * len(long_name)
    assert "5 runs in turn, 1 sequence, 2 threads" in texts
    assert not any("first token" in text for text in texts if text)
    lowest = max(float(text.attrib["y"]) for text in texts.values())
    assert lowest < float(background.attrib["height"])
