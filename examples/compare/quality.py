"""What rounding costs: every candidate of quality_variants.py by one ruler, as a table and a drawing.

    python examples/compare/quality.py --model moved --write docs/quantization.md --plot docs/images/kld.svg

The ruler is that of `llmc eval`: the same windows of a text through every engine, whose logits are held against those
of the model in transformers, in float32. Engines run in environments and processes of their own. What is done is kept
under CACHE, by what it depends on, so that a run that was stopped goes on; a candidate that fails leaves the others.
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
from quality_report import ENGINES, Row, reason_of, table
from quality_ruler import Ruler, fingerprint, write_whole
from quality_speed import Workload, graphs_of, run_peer, run_rounds, speed_key
from quality_variants import CANDIDATES, UNQUANTIZED
from report import around_section, replace_section

from llmc.errors import LlmcError
from llmc.runtimes.engines.cores import physical_cores

TITLES = {
    "moved": "SmolLM2-135M-Instruct with moved scales",
    "demo": "SmolLM2-135M-Instruct, which lies on a 4-bit grid",
    "llama-1b": "1.1B Llama shape, random weights",
}
_TOLD = (RuntimeError, OSError, LlmcError)


def main() -> None:
    args = _arguments()
    if args.write:
        around_section(args.write)  # an hour later would be late to find out
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
        _attempt(row, "making", make_one)

    ruler, results = Ruler(hf, args.text, args.max_tokens), cache / "quality" / args.model

    def measure_quality(row: Row) -> None:
        name, engine = row.candidate.name, row.candidate.engine
        files = made[name]
        script = f"quality_peer_{engine}.py"
        mark = fingerprint(engine, files.measured, [script, f"peer_{engine}.py"])
        command = [python_of(engine, cache), HERE / script, files.measured, f"--threads={args.threads}"]
        row.evaluation = ruler.measured(name, mark, results, command)

    for row in rows:
        _attempt(row, "measuring quality", measure_quality)

    _measure_speed([row for row in rows if not row.failed], made, workload, args, cache)
    text = _text(rows, ruler, workload, args)
    if args.plot and (points := _points(rows)):
        scored = f"mean of {ruler.scored:,} tokens ({ruler.text.source})"
        note = f"KL divergence from float32, nats, {scored}; low and left is good"
        write_whole(args.plot, svg(points, TITLES[args.model], note))
        place = os.path.relpath(args.plot, args.write.parent if args.write else Path())
        text += f"\n\n![Divergence against size]({Path(place).as_posix()})"
    print(text)
    if args.write:
        replace_section(args.write, text)
    sys.exit(any(row.failed for row in rows))


def _attempt(row: Row, step: str, work: Callable[[Row], None]) -> None:
    """Do a candidate's next step, unless one before went wrong; what goes wrong now stands in its row."""
    if row.failed:
        return
    print(f"{row.candidate.name}: {step}", file=sys.stderr, flush=True)
    try:
        work(row)
    except _TOLD as error:
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
        place = f"--workload={cache / 'models' / args.model / WORKLOAD}"
        return run_peer(
            [python_of(engine, cache), HERE / f"peer_{engine}.py", made[name].folder, place, *workload.options()]
        )

    found = run_rounds(list(by_name), args.rounds, log, measure, lambda name, error: _fail(by_name[name], error))
    for row in rows:
        row.rounds = found.get(row.timed_as or row.candidate.name, ())


def _text(rows: list[Row], ruler: Ruler, workload: Workload, args: argparse.Namespace) -> str:
    versions = {ENGINES[row.candidate.engine]: row.evaluation["version"] for row in rows if row.evaluation}
    lines = [
        f"`examples/compare/quality.py --model {args.model}`, {datetime.date.today().isoformat()}, "
        f"{describe(args.threads)}. {TITLES[args.model]}; {ruler.scored:,} tokens in {len(ruler.windows)} windows of "
        f"`{ruler.text.source}` (sha256 {ruler.text.sha256[:12]}). Speeds are medians of {args.rounds} rounds of "
        f"{workload.repeats} repeats. {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        table(rows, workload.prompt, workload.tokens),
    ]
    return "\n".join(lines)


def _points(rows: list[Row]) -> list[Point]:
    """All that were rounded and measured."""
    return [
        Point(ENGINES[row.candidate.engine], row.candidate.format, row.bytes, kld["mean"], kld["stderr"])
        for row in rows
        if row.candidate.bits < UNQUANTIZED and row.bytes and row.evaluation
        for kld in [row.evaluation["kld"]]
    ]


def _arguments() -> argparse.Namespace:
    names = [candidate.name for candidate in CANDIDATES]
    parser = argparse.ArgumentParser(description="Measure what quantization costs, of llmc and of its peers.")
    parser.add_argument("--model", choices=list(TITLES), default="moved")
    parser.add_argument("--only", nargs="+", action="extend", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--text", default="topics", help="docstrings, topics or a file; llmc calibrates on docstrings")
    parser.add_argument("--max-tokens", type=int, default=16384, metavar="N", help="read that many tokens at most")
    parser.add_argument("--rounds", type=int, default=3, help="of speed; default: 3")
    parser.add_argument("--repeats", type=int, default=3, help="in each round; default: 3")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: the physical cores")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="environments, models and results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the section between the page's markers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw divergence against size as SVG")
    parser.add_argument("--noisy", action="store_true", help="don't wait for a quiet machine; for trials only")
    args = parser.parse_args()
    if args.write and args.noisy:
        parser.error("figures of a noisy machine are not written into a page")
    return args


if __name__ == "__main__":
    main()
