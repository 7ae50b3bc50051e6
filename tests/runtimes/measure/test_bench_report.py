"""A measurement as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from llmc.runtimes.engines.base import KernelTime
from llmc.runtimes.measure.bench import BenchResult, KernelProfile, Latency, Rate
from llmc.runtimes.measure.bench_report import (
    as_csv,
    markdown,
    markdown_of_several,
    workload_markdown,
    workload_markdown_of_several,
)
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
    line = next(csv.DictReader(io.StringIO(as_csv([("demo", few)]))))
    assert (line["p50_ms"], line["p95_ms"], line["p99_ms"]) == ("345.678", "", "")


SERVED = WorkloadResult(
    requests=64,
    tokens=1500,
    tokens_per_s=750.0,
    tokens_per_s_min=700.0,
    tokens_per_s_max=1000.25,
    seconds=2.0,
    ttft_ms=Latency(10, 20, None),
    itl_ms=Latency(1, 2, 3.125),
    steps=240,
    runs=300,
    fewest_runs=250,
    concurrency=8,
    repeats=3,
)


def test_a_served_workload() -> None:
    assert workload_markdown(SERVED, "demo") == (
        "| demo | p50 | p95 | p99 |\n"
        "|---|---:|---:|---:|\n"
        "| first token, ms | 10.00 | 20.00 |  |\n"
        "| each next token, ms | 1.00 | 2.00 | 3.12 |\n"
        "\n"
        "750.0 tokens/s (700.0 to 1,000.2 in 3 runs): 64 requests, 1,500 new tokens in 2.00 s, at most 8 at once\n"
        "300 graph runs in 240 steps (1.25 per step); 1.20 times the fewest possible, 250\n"
    )


def test_a_workload_that_several_artifacts_served() -> None:
    other = replace(SERVED, tokens_per_s=80.5, tokens=1400, runs=1250)
    assert workload_markdown_of_several([("a", SERVED), ("b", other)]) == (
        "| artifact | tokens/s | min | max | first token, ms: p50 | p95 | p99 | each next token, ms: p50 | p95 | p99 "
        "| new tokens | steps | graph runs | times the fewest |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        "| a | 750.0 | 700.0 | 1,000.2 | 10.00 | 20.00 |  | 1.00 | 2.00 | 3.12 | 1,500 | 240 | 300 | 1.20 |\n"
        "| b | 80.5 | 700.0 | 1,000.2 | 10.00 | 20.00 |  | 1.00 | 2.00 | 3.12 | 1,400 | 240 | 1,250 | 5.00 |\n"
        "\n"
        "3 runs in turn: 64 requests, at most 8 at once\n"
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
    table = list(csv.reader(io.StringIO(as_csv([("demo", PROFILED)]))))
    assert len({len(line) for line in table}) == 1
    rows = list(csv.DictReader(io.StringIO(as_csv([("demo", PROFILED)]))))
    assert [(row["test"], row["tokens_per_s"], row["kernel"]) for row in rows] == [
        ("pp512", "1481.25", ""), ("tg128", "288.0", ""),
        ("pp512", "", "MatMulNBits"), ("pp512", "", "Add"), ("tg128", "", "MatMulNBits"),
    ]  # fmt: skip
    assert [rows[3][name] for name in ("calls", "total_ms", "share")] == ["60", "100.0", "0.25"]
    assert "kernel" not in as_csv([("demo", RESULT)])


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
    rows = list(csv.DictReader(io.StringIO(as_csv([("demo", RESULT)]))))
    assert [(row["test"], row["latency"]) for row in rows] == [("pp512", "ttft"), ("tg128", "tpot")]
    assert float(rows[0]["tokens_per_s"]) == 1481.25
    assert float(rows[1]["p99_ms"]) == 4.2
    assert {row["peak_rss_bytes"] for row in rows} == {"312000000"}
    assert "artifact" not in rows[0]


def test_a_test_that_did_not_run_is_left_out() -> None:
    half = replace(RESULT, rates=RESULT.rates[1:], ttft_ms=None)
    for text in (markdown(half, "x"), as_csv([("x", half)])):
        assert "tg128" in text
        assert "pp512" not in text and "first token" not in text and "ttft" not in text


OTHER = replace(
    RESULT,
    rates=(Rate("pp512", 700.0, 650.0, 720.0), Rate("tg128", 310.5, 300.0, 320.0)),
    tpot_ms=Latency(3.2, 3.3, None),
    load_s=1.5,
)
BOTH = [("a", replace(RESULT, peak_rss_bytes=None)), ("b", replace(OTHER, peak_rss_bytes=None))]


def test_several_artifacts_are_one_table() -> None:
    assert markdown_of_several(BOTH) == (
        "| artifact | test | tokens/s | min | max | p50, ms | p95, ms | p99, ms | load, s |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
        "| a | pp512 | 1,481.2 | 1,400.0 | 1,500.0 | 345.68 | 360.00 | 365.00 | 0.42 |\n"
        "| a | tg128 | 288.0 | 280.0 | 290.0 | 3.47 | 3.60 | 4.20 | 0.42 |\n"
        "| b | pp512 | 700.0 | 650.0 | 720.0 | 345.68 | 360.00 | 365.00 | 1.50 |\n"
        "| b | tg128 | 310.5 | 300.0 | 320.0 | 3.20 | 3.30 |  | 1.50 |\n"
        "\n"
        "p50, p95, p99: time to the first token (pp), and to each next one (tg)\n"
        "\n"
        "5 runs in turn, 1 sequence, 2 threads\n"
    )
    apart = [BOTH[0], ("b", replace(BOTH[1][1], threads=1))]
    assert markdown_of_several(apart).endswith("5 runs in turn, 1 sequence\n")
    once = [(name, replace(result, repeats=1, concurrency=2)) for name, result in BOTH]
    assert markdown_of_several(once).endswith("1 run in turn, 2 sequences, 2 threads\n")


def test_profiles_of_several_artifacts() -> None:
    both = [("a", BOTH[0][1]), ("b", PROFILED)]
    assert "\n\n| b, tg128, kernel | calls | total ms | share |\n" in markdown_of_several(both)
    rows = list(csv.DictReader(io.StringIO(as_csv([("a", RESULT), ("b", PROFILED)]))))
    assert [(row["artifact"], row["test"], row["kernel"]) for row in rows] == [
        ("a", "pp512", ""), ("a", "tg128", ""),
        ("b", "pp512", ""), ("b", "tg128", ""),
        ("b", "pp512", "MatMulNBits"), ("b", "pp512", "Add"), ("b", "tg128", "MatMulNBits"),
    ]  # fmt: skip


def test_csv_of_several_artifacts() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(BOTH))))
    assert [(row["artifact"], row["test"], row["load_s"]) for row in rows] == [
        ("a", "pp512", "0.42"), ("a", "tg128", "0.42"), ("b", "pp512", "1.5"), ("b", "tg128", "1.5"),
    ]  # fmt: skip
    assert "peak_rss_bytes" not in rows[0] and not {None, ""} & {*rows[0]}
