"""A measurement as a drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from llmc.runtimes.measure.bench import BenchResult, Latency, Rate
from llmc.runtimes.measure.bench_plot import svg

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
    root = ElementTree.fromstring(svg(RESULT, "demo <int4> & more"))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(r.attrib["width"]) for r in root.iter(f"{space}rect")][1:]
    assert abs(bars[0] / bars[1] - 1481.25 / 288) < 0.01
    texts = [t.text or "" for t in root.iter(f"{space}text")]
    assert texts[0] == "demo <int4> & more"
    assert {"pp512", "1,481.2", "tg128", "288.0"} <= set(texts)
    assert "first token 345.7 ms (p99 365.0), each next token 3.5 ms (p99 4.2)" in texts
    assert all(float(r.attrib["width"]) <= float(root.attrib["width"]) for r in root.iter(f"{space}rect"))


def test_what_was_not_measured_is_left_out() -> None:
    few = replace(RESULT, ttft_ms=Latency(345.678, None, None))
    assert "first token 345.7 ms, each next token 3.5 ms (p99 4.2)" in svg(few, "demo")
    half = svg(replace(RESULT, rates=RESULT.rates[1:], ttft_ms=None), "x")
    assert "tg128" in half and "pp512" not in half and "first token" not in half
