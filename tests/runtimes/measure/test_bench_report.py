"""A bench result as Markdown, CSV and SVG."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from llmc.runtimes.measure.bench import BenchResult, Latency, Rate
from llmc.runtimes.measure.bench_report import as_csv, markdown, svg

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


def test_markdown() -> None:
    assert markdown(RESULT, "demo, int4") == (
        "| demo, int4 | tokens/s | min | max |\n"
        "|---|---:|---:|---:|\n"
        "| pp512 | 1,481.2 | 1,400.0 | 1,500.0 |\n"
        "| tg128 | 288.0 | 280.0 | 290.0 |\n"
        "\n"
        "| latency, ms | p50 | p95 | p99 |\n"
        "|---|---:|---:|---:|\n"
        "| first token | 345.68 | 360.00 | 365.00 |\n"
        "| each next token | 3.47 | 3.60 | 4.20 |\n"
        "\n"
        "5 runs, 1 sequence, 2 threads, loaded in 0.42 s, peak memory 312 MB\n"
    )


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(RESULT))))
    assert [(row["test"], row["latency"]) for row in rows] == [("pp512", "ttft"), ("tg128", "tpot")]
    assert float(rows[0]["tokens_per_s"]) == 1481.25
    assert float(rows[1]["p99_ms"]) == 4.2
    assert {row["peak_rss_bytes"] for row in rows} == {"312000000"}


def test_a_test_that_did_not_run_is_left_out() -> None:
    half = replace(RESULT, rates=RESULT.rates[1:], ttft_ms=None)
    for text in (markdown(half, "x"), as_csv(half), svg(half, "x")):
        assert "tg128" in text
        assert "pp512" not in text and "first token" not in text and "ttft" not in text


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
