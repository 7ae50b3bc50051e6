"""A measurement as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from llmc.runtimes.engines.base import KernelTime
from llmc.runtimes.measure.bench import BenchResult, KernelProfile, Latency, Rate
from llmc.runtimes.measure.bench_report import as_csv, markdown, workload_markdown
from llmc.runtimes.measure.workload import WorkloadResult

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

PROFILED = replace(
    RESULT,
    profiles=(
        KernelProfile("pp512", (KernelTime("MatMulNBits", 242, 300.0), KernelTime("Add", 60, 100.0))),
        KernelProfile("tg128", (KernelTime("MatMulNBits", 15488, 450.125),)),
    ),
)


def test_unknown_percentiles_are_left_empty() -> None:
    few = replace(RESULT, ttft_ms=Latency(345.678, None, None))
    assert "| first token | 345.68 |  |  |" in markdown(few, "demo")
    line = next(csv.DictReader(io.StringIO(as_csv(few))))
    assert (line["p50_ms"], line["p95_ms"], line["p99_ms"]) == ("345.678", "", "")


def test_a_served_workload() -> None:
    result = WorkloadResult(64, 1500, 2.0, Latency(10, 20, None), Latency(1, 2, 3.125), 240, 300, 250, 8)
    assert workload_markdown(result, "demo") == (
        "| demo | p50 | p95 | p99 |\n"
        "|---|---:|---:|---:|\n"
        "| first token, ms | 10.00 | 20.00 |  |\n"
        "| each next token, ms | 1.00 | 2.00 | 3.12 |\n"
        "\n"
        "750.0 tokens/s: 64 requests, 1,500 new tokens in 2.00 s, at most 8 at once\n"
        "300 graph runs in 240 steps (1.25 per step); 1.20 times the fewest possible, 250\n"
    )


def test_profiles_follow_the_other_tables() -> None:
    text = markdown(PROFILED, "demo")
    assert text.startswith(markdown(RESULT, "demo").rpartition("\n\n")[0])
    assert text.split("\n\n")[2:4] == [
        "| pp512, kernel | calls | total ms | share |\n"
        "|---|---:|---:|---:|\n"
        "| MatMulNBits | 242 | 300.00 | 75.0% |\n"
        "| Add | 60 | 100.00 | 25.0% |",
        "| tg128, kernel | calls | total ms | share |\n"
        "|---|---:|---:|---:|\n"
        "| MatMulNBits | 15,488 | 450.12 | 100.0% |",
    ]


def test_profiles_in_csv() -> None:
    table = list(csv.reader(io.StringIO(as_csv(PROFILED))))
    assert len({len(line) for line in table}) == 1
    rows = list(csv.DictReader(io.StringIO(as_csv(PROFILED))))
    assert [(row["test"], row["tokens_per_s"], row["kernel"]) for row in rows] == [
        ("pp512", "1481.25", ""), ("tg128", "288.0", ""),
        ("pp512", "", "MatMulNBits"), ("pp512", "", "Add"), ("tg128", "", "MatMulNBits"),
    ]  # fmt: skip
    assert [rows[3][name] for name in ("calls", "total_ms", "share")] == ["60", "100.0", "0.25"]
    assert "kernel" not in as_csv(RESULT)


def test_profiles_in_json() -> None:
    first, second = PROFILED.as_dict()["profile"]
    assert first["test"] == "pp512" and second["test"] == "tg128"
    assert first["kernels"][1] == {"kernel": "Add", "calls": 60, "ms": 100.0, "share": 0.25}
    assert "profile" not in RESULT.as_dict()


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
    for text in (markdown(half, "x"), as_csv(half)):
        assert "tg128" in text
        assert "pp512" not in text and "first token" not in text and "ttft" not in text
