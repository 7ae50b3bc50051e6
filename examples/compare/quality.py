"""Measure the quality of quantized models.

The results of every candidate of quality_variants.py become a table and a plot.

    python examples/compare/quality.py --model moved --write docs/quantization.md --plot docs/images/kld.svg

The evaluation is that of `llmc eval`: every engine runs the same windows of a text, and its logits are compared with
those of the model in transformers, in float32. Engines run in their own environments and processes. Results are stored
under CACHE, keyed by everything that they depend on, so that an interrupted run resumes. If a candidate fails, the run
continues with the others.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import HERE, python_of
from machine import describe, wait_until_quiet
from prepare import DEFAULT_CACHE, prepare
from protocol import WORKLOAD
from quality_make import Made, make, parameters
from quality_plot import Point, svg
from quality_reference import ReferenceLogits, fingerprint, write_atomically
from quality_report import ENGINES, Row, reason_of, table
from quality_speed import Workload, graphs_of, run_rounds, speed_key
from quality_variants import CANDIDATES, UNQUANTIZED
from report import around_section, replace_section
from turns import run_peer

from llmc.errors import LlmcError
from llmc.runtimes.engines.cores import physical_cores

TITLES = {
    "moved": "SmolLM2-135M-Instruct with moved scales",
    "demo": "SmolLM2-135M-Instruct, whose weights are on a 4-bit grid",
    "llama-1b": "1.1B Llama shape, random weights",
}
_CANDIDATE_ERRORS = (RuntimeError, OSError, LlmcError)


def main() -> None:
    args = _arguments()
    if args.write:
        around_section(args.write)  # fail now, not after an hour, if the page has no markers
    cache, workload = args.cache.resolve(), Workload(512, 128, args.threads, args.repeats)
    rows = [Row(candidate) for candidate in CANDIDATES if not args.only or candidate.name in args.only]
    prepare(args.model, [], cache)
    hf = cache / "models" / args.model / "hf"
    count = parameters(hf)
    made: dict[str, Made] = {}

    def make_one(row: Row) -> None:
        files = make(row.candidate, args.model, cache, quiet=not args.noisy)
        row.bytes, row.weight_bits, row.cost = files.bytes, 8 * files.weight_bytes / count, files.cost
        made[row.candidate.name] = files

    for row in rows:
        attempt(row, "making", make_one)

    reference, results = ReferenceLogits(hf, args.text, args.max_tokens), cache / "quality" / args.model

    def measure_quality(row: Row) -> None:
        name, engine = row.candidate.name, row.candidate.engine
        files = made[name]
        script = f"quality_peer_{engine}.py"
        mark = fingerprint(engine, files.measured, [script, f"peer_{engine}.py"])
        command = [python_of(engine, cache), HERE / script, files.measured, f"--threads={args.threads}"]
        row.evaluation = reference.measured(name, mark, results, command)

    for row in rows:
        attempt(row, "measuring quality", measure_quality)

    _measure_speed([row for row in rows if not row.failed], made, workload, args, cache)
    text = _text(rows, reference, workload, args)
    if args.plot and (points := _points(rows)):
        scored = f"mean of {reference.scored:,} tokens ({reference.text.source})"
        note = f"KL divergence from float32, nats, {scored}; low and left is good"
        write_atomically(args.plot, svg(points, TITLES[args.model], note))
        link = os.path.relpath(args.plot, args.write.parent if args.write else Path())
        text += f"\n\n![Divergence against size]({Path(link).as_posix()})"
    print(text)
    if args.write:
        replace_section(args.write, text)
    sys.exit(any(row.failed for row in rows))


def attempt(row: Row, step: str, work: Callable[[Row], None]) -> None:
    """Run a candidate's next step, unless an earlier one failed.

    An error is recorded in `row.failed`.
    """
    if row.failed:
        return
    print(f"{row.candidate.name}: {step}", file=sys.stderr, flush=True)
    try:
        work(row)
    except _CANDIDATE_ERRORS as error:
        _fail(row, error)


def _fail(row: Row, error: Exception) -> None:
    print(f"{row.candidate.name} failed: {error}", file=sys.stderr, flush=True)
    row.failed = reason_of(error)


def _measure_speed(
    rows: list[Row], made: dict[str, Made], workload: Workload, args: argparse.Namespace, cache: Path
) -> None:
    first: dict[str, str] = {}
    for row in rows:
        name, engine = row.candidate.name, row.candidate.engine
        same = first.setdefault(graphs_of(made[name].folder) if engine == "llmc" else name, name)
        row.timed_as = "" if same == name else same
    by_name = {row.candidate.name: row for row in rows if not row.timed_as}
    parts = {
        name: fingerprint(row.candidate.engine, made[name].folder, [f"peer_{row.candidate.engine}.py", "protocol.py"])
        for name, row in by_name.items()
    }
    log = cache / "quality" / args.model / f"speed-{speed_key(parts, workload, quiet=not args.noisy)}.json"

    def measure(name: str) -> dict[str, Any]:
        if not args.noisy:
            wait_until_quiet()
        print(f"{name}: measuring speed", file=sys.stderr, flush=True)
        engine = by_name[name].candidate.engine
        workload_file = f"--workload={cache / 'models' / args.model / WORKLOAD}"
        script = HERE / f"peer_{engine}.py"
        return run_peer([python_of(engine, cache), script, made[name].folder, workload_file, *workload.options()])

    results = run_rounds(list(by_name), args.rounds, log, measure, lambda name, error: _fail(by_name[name], error))
    for row in rows:
        row.rounds = results.get(row.timed_as or row.candidate.name, ())


def _text(rows: list[Row], reference: ReferenceLogits, workload: Workload, args: argparse.Namespace) -> str:
    versions = {ENGINES[row.candidate.engine]: row.evaluation["version"] for row in rows if row.evaluation}
    lines = [
        f"`examples/compare/quality.py --model {args.model}`, {datetime.date.today().isoformat()}, "
        f"{describe(args.threads)}. {TITLES[args.model]}; {reference.scored:,} tokens in {len(reference.windows)} "
        f"windows of `{reference.text.source}` (sha256 {reference.text.sha256[:12]}). Speeds are medians of "
        f"{args.rounds} rounds of {workload.repeats} repeats. "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        table(rows, workload.prompt, workload.tokens),
    ]
    return "\n".join(lines)


def _points(rows: list[Row]) -> list[Point]:
    """Points for all quantized candidates that were measured."""
    return [
        Point(ENGINES[row.candidate.engine], row.candidate.format, row.bytes, kld["mean"], kld["stderr"])
        for row in rows
        if row.candidate.bits < UNQUANTIZED and row.bytes and row.evaluation
        for kld in [row.evaluation["kld"]]
    ]


def _arguments() -> argparse.Namespace:
    names = [candidate.name for candidate in CANDIDATES]
    parser = argparse.ArgumentParser(description="Measure the quality of quantized models of llmc and its peers.")
    parser.add_argument("--model", choices=list(TITLES), default="moved")
    parser.add_argument("--only", nargs="+", action="extend", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--text", default="topics", help="docstrings, topics or a file; llmc calibrates on docstrings")
    parser.add_argument("--max-tokens", type=int, default=16384, metavar="N", help="use at most N tokens of the text")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of speed measurement; default: 3")
    parser.add_argument("--repeats", type=int, default=3, help="repeats per round; default: 3")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: number of physical cores")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for environments, models and results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the section between this page's markers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot divergence against size as SVG")
    parser.add_argument("--noisy", action="store_true", help="don't wait for a quiet machine; for trials only")
    args = parser.parse_args()
    if args.write and args.noisy:
        parser.error("--write needs a quiet machine: remove --noisy or --write")
    return args


if __name__ == "__main__":
    main()
