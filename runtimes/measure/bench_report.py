"""Write measurements as Markdown or CSV: of one artifact, or of several in one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

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
        lines += ["", *_kernel_table(profile, profile.test)]
    return "\n".join([*lines, "", conditions([result])]) + "\n"


def markdown_of_several(results: Sequence[tuple[str, BenchResult]]) -> str:
    """Write one table of the rates, latencies and loading times of artifacts, their profiles, and the conditions.

    Args:
        results: by the name of an artifact.
    """
    lines = [
        "| artifact | test | tokens/s | min | max | p50, ms | p95, ms | p99, ms | load, s |",
        "|---|---|" + "---:|" * 7,
    ]
    for name, result in results:
        for rate in result.rates:
            rates = [f"{value:,.1f}" for value in (rate.median, rate.min, rate.max)]
            load = "" if result.load_s is None else f"{result.load_s:.2f}"
            lines.append(_row(name, rate.test, *rates, *_milliseconds(_latency(result, rate.test)[1]), load))
    lines += ["", "p50, p95, p99: time to the first token (pp), and to each next one (tg)"]
    for name, result in results:
        for profile in result.profiles:
            lines += ["", *_kernel_table(profile, f"{name}, {profile.test}")]
    return "\n".join([*lines, "", conditions([result for _, result in results])]) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _latency(result: BenchResult, test: str) -> tuple[str, Latency | None]:
    """Return the kind of latency that a test measures, and its percentiles."""
    return ("ttft", result.ttft_ms) if test.startswith("pp") else ("tpot", result.tpot_ms)


def workload_markdown(result: WorkloadResult, name: str) -> str:
    """Write a table of a served workload."""
    lines = [
        f"| {name} | p50 | p95 | p99 |",
        "|---|---:|---:|---:|",
        f"| first token, ms | {' | '.join(_milliseconds(result.ttft_ms))} |",
        f"| each next token, ms | {' | '.join(_milliseconds(result.itl_ms))} |",
        "",
        f"{result.tokens_per_s:,.1f} tokens/s ({result.tokens_per_s_min:,.1f} to {result.tokens_per_s_max:,.1f} in "
        f"{_runs(result.repeats)}): {result.requests} requests, {result.tokens:,} new tokens in "
        f"{result.seconds:,.2f} s, at most {result.concurrency} at once",
        f"{result.runs:,} graph runs in {result.steps:,} steps ({result.runs / result.steps:.2f} per step); "
        f"{result.runs / result.fewest_runs:.2f} times the fewest possible, {result.fewest_runs:,}",
    ]
    return "\n".join(lines) + "\n"


def workload_markdown_of_several(results: Sequence[tuple[str, WorkloadResult]]) -> str:
    """Write one table of a workload that several artifacts served.

    Args:
        results: by the name of an artifact.
    """
    lines = [
        "| artifact | tokens/s | min | max | first token, ms: p50 | p95 | p99 | each next token, ms: p50 | p95 | p99 "
        "| new tokens | steps | graph runs | times the fewest |",
        "|---|" + "---:|" * 13,
    ]
    for name, result in results:
        rates = (result.tokens_per_s, result.tokens_per_s_min, result.tokens_per_s_max)
        cells = [
            *(f"{value:,.1f}" for value in rates),
            *_milliseconds(result.ttft_ms),
            *_milliseconds(result.itl_ms),
            *(f"{count:,}" for count in (result.tokens, result.steps, result.runs)),
            f"{result.runs / result.fewest_runs:.2f}",
        ]
        lines.append(_row(name, *cells))
    result = results[0][1]
    summary = f"{_runs(result.repeats)} in turn: {result.requests} requests, at most {result.concurrency} at once"
    return "\n".join([*lines, "", summary]) + "\n"


def _runs(count: int) -> str:
    return f"{count} run{'s'[: count > 1]}"


def _percentiles(latency: Latency | None) -> list[float | None]:
    return [latency.p50, latency.p95, latency.p99] if latency else []


def _milliseconds(latency: Latency | None) -> list[str]:
    return ["" if value is None else f"{value:,.2f}" for value in _percentiles(latency)]


def _kernel_table(profile: KernelProfile, name: str) -> list[str]:
    rows = zip(profile.kernels, profile.shares, strict=True)
    return [
        f"| {name}, kernel | calls | total ms | share |",
        "|---|---:|---:|---:|",
        *(f"| {kernel.kernel} | {kernel.calls:,} | {kernel.ms:,.2f} | {share:.1%} |" for kernel, share in rows),
    ]


def as_csv(results: Sequence[tuple[str, BenchResult]]) -> str:
    """Write one table: a line for each test, with the shared conditions, and one for each kernel of a profile.

    The columns of kernels are there only if there is a profile, and the column of the artifact if there are several. A
    line leaves the columns of the other kind empty.

    Args:
        results: by the name of an artifact.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    name_column = ["artifact"] if len(results) > 1 else []
    columns = ["test", "tokens_per_s", "min", "max", "latency", "p50_ms", "p95_ms", "p99_ms"]
    columns += results[0][1].conditions()
    has_profile = any(result.profiles for _, result in results)
    kernel_columns = ["kernel", "calls", "total_ms", "share"] if has_profile else []
    writer.writerow([*name_column, *columns, *kernel_columns])
    for name, result in results:
        named = [name] if name_column else []
        for rate in result.rates:
            kind, latency = _latency(result, rate.test)
            percentiles = ["" if value is None else value for value in _percentiles(latency)]
            line = [rate.test, rate.median, rate.min, rate.max, kind, *percentiles, *result.conditions().values()]
            writer.writerow([*named, *line, *("" for _ in kernel_columns)])
        for profile in result.profiles:
            for kernel, share in zip(profile.kernels, profile.shares, strict=True):
                line = [profile.test, *("" for _ in columns[1:])]
                writer.writerow([*named, *line, kernel.kernel, kernel.calls, kernel.ms, share])
    return text.getvalue()


def conditions(results: Sequence[BenchResult]) -> str:
    """Write as a line what all tests share: runs, sequences and threads; of one artifact also loading and memory."""
    result, several = results[0], len(results) > 1
    parts = [f"{_runs(result.repeats)}{' in turn' if several else ''}"]
    parts.append(f"{result.concurrency} sequence{'s'[: result.concurrency > 1]}")
    if result.threads and all(one.threads == result.threads for one in results):
        parts.append(f"{result.threads} thread{'s'[: result.threads > 1]}")
    if result.load_s is not None and not several:
        parts.append(f"loaded in {result.load_s:.2f} s")
    if result.peak_rss_bytes and not several:
        parts.append(f"peak memory {result.peak_rss_bytes / 1e6:,.0f} MB")
    return ", ".join(parts)
