"""Write a measurement as Markdown or CSV."""

from __future__ import annotations

import csv
import io

from .bench import BenchResult, KernelProfile, Latency
from .workload import WorkloadResult


def markdown(result: BenchResult, name: str) -> str:
    """Write tables of rates, latencies and profiles, and a line with the conditions."""
    lines = [f"| {name} | tokens/s | min | max |", "|---|---:|---:|---:|"]
    lines += [f"| {r.test} | {r.median:,.1f} | {r.min:,.1f} | {r.max:,.1f} |" for r in result.rates]
    lines += ["", "| latency, ms | p50 | p95 | p99 |", "|---|---:|---:|---:|"]
    for title, latency in (("first token", result.ttft_ms), ("each next token", result.tpot_ms)):
        if latency:
            lines.append(f"| {title} | {' | '.join(_milliseconds(latency))} |")
    for profile in result.profiles:
        lines += ["", *_kernel_table(profile)]
    return "\n".join([*lines, "", conditions(result)]) + "\n"


def workload_markdown(result: WorkloadResult, name: str) -> str:
    """Write a table of a served workload."""
    lines = [
        f"| {name} | p50 | p95 | p99 |",
        "|---|---:|---:|---:|",
        f"| first token, ms | {' | '.join(_milliseconds(result.ttft_ms))} |",
        f"| each next token, ms | {' | '.join(_milliseconds(result.itl_ms))} |",
        "",
        f"{result.tokens_per_s:,.1f} tokens/s: {result.requests} requests, {result.tokens:,} new tokens in "
        f"{result.seconds:,.2f} s, at most {result.concurrency} at once",
        f"{result.runs:,} graph runs in {result.steps:,} steps ({result.runs / result.steps:.2f} per step); "
        f"{result.runs / result.fewest_runs:.2f} times the fewest possible, {result.fewest_runs:,}",
    ]
    return "\n".join(lines) + "\n"


def _percentiles(latency: Latency | None) -> list[float | None]:
    return [latency.p50, latency.p95, latency.p99] if latency else []


def _milliseconds(latency: Latency) -> list[str]:
    return ["" if value is None else f"{value:,.2f}" for value in _percentiles(latency)]


def _kernel_table(profile: KernelProfile) -> list[str]:
    rows = zip(profile.kernels, profile.shares, strict=True)
    return [
        f"| {profile.test}, kernel | calls | total ms | share |",
        "|---|---:|---:|---:|",
        *(f"| {kernel.kernel} | {kernel.calls:,} | {kernel.ms:,.2f} | {share:.1%} |" for kernel, share in rows),
    ]


def as_csv(result: BenchResult) -> str:
    """Write one table: a line for each test, with the shared conditions, and one for each kernel of a profile.

    The columns of kernels are there only if there is a profile. A line leaves the columns of the other kind empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shared = result.conditions()
    columns = ["test", "tokens_per_s", "min", "max", "latency", "p50_ms", "p95_ms", "p99_ms", *shared]
    kernel_columns = ["kernel", "calls", "total_ms", "share"] if result.profiles else []
    writer.writerow([*columns, *kernel_columns])
    for rate in result.rates:
        kind, latency = ("ttft", result.ttft_ms) if rate.test.startswith("pp") else ("tpot", result.tpot_ms)
        percentiles = ["" if value is None else value for value in _percentiles(latency)]
        line = [rate.test, rate.median, rate.min, rate.max, kind, *percentiles, *shared.values()]
        writer.writerow([*line, *("" for _ in kernel_columns)])
    for profile in result.profiles:
        for kernel, share in zip(profile.kernels, profile.shares, strict=True):
            line = [profile.test, *("" for _ in columns[1:])]
            writer.writerow([*line, kernel.kernel, kernel.calls, kernel.ms, share])
    return text.getvalue()


def conditions(result: BenchResult) -> str:
    """Write the facts that all tests share as a line."""
    parts = [f"{result.repeats} runs", f"{result.concurrency} sequence{'s'[: result.concurrency > 1]}"]
    if result.threads:
        parts.append(f"{result.threads} thread{'s'[: result.threads > 1]}")
    if result.load_s is not None:
        parts.append(f"loaded in {result.load_s:.2f} s")
    if result.peak_rss_bytes:
        parts.append(f"peak memory {result.peak_rss_bytes / 1e6:,.0f} MB")
    return ", ".join(parts)
