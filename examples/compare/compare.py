"""Compare llmc, onnxruntime-genai, llama.cpp and OpenVINO GenAI.

All run the same weights, and one table has their speeds.

    python examples/compare/compare.py --model demo --model llama-1b --rounds 5 --write docs/performance.md

Every engine runs in its own environment and process. The engines take turns (A B C A B C ...), so that a machine that
warms up or slows down affects all of them equally. The figures are medians over the rounds of each round's median
repeat. protocol.py defines what is measured, and prepare.py how each model is made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from environments import HERE, python_of
from machine import describe, wait_until_quiet
from prepare import DEFAULT_CACHE, VARIANTS, Variant, prepare
from protocol import WORKLOAD
from report import Row, around_section, refuse_other_weights, replace_section, table

from llmc.runtimes.engines.cores import physical_cores

_TITLES = {
    "demo": "demo (SmolLM2-135M-Instruct)",
    "llama-1b": "1.1B Llama shape, random weights",
}


def main() -> None:
    args = _arguments()
    if args.write:
        around_section(args.write)  # fail now, not after hours, if the page has no markers
    cache = args.cache.resolve()
    selected = [variant for variant in VARIANTS if not args.only or variant.name in args.only]
    prepared = {model: prepare(model, selected, cache) for model in args.model or ["demo"]}

    pythons = {variant: python_of(variant.engine, cache) for variant in selected}
    expected = {model: _expected(cache / "models" / model / WORKLOAD) for model in prepared}
    date = datetime.date.today().isoformat()
    log = cache / "results" / f"{datetime.datetime.now():%Y%m%dT%H%M%S}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[tuple[str, Variant], list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for model, folders in prepared.items():
            for variant, folder in folders.items():
                if not args.noisy:
                    wait_until_quiet()
                result = _measure(pythons[variant], variant, folder, args)
                measured.setdefault((model, variant), []).append(result)
                with log.open("a") as file:
                    file.write(json.dumps({"date": date, "model": model, "round": number, **result}) + "\n")
                refuse_other_weights(Row(variant.bits, variant.format, [result]), expected[model])
                print(f"round {number + 1}/{args.rounds} {model} {variant.name}", file=sys.stderr, flush=True)

    text = [
        f"`examples/compare/compare.py`, {date}, {describe(args.threads)}. Medians of {args.rounds} rounds of "
        f"{args.repeats} repeats, with the slowest and the fastest round."
    ]
    for model in prepared:
        rows = [Row(key.bits, key.format, rounds) for (name, key), rounds in measured.items() if name == model]
        text += ["", f"### {_TITLES[model]}", "", table(rows, expected[model], args.prompt, args.tokens)]
    print("\n".join(text))
    print(f"Wrote all figures to {log}.", file=sys.stderr)
    if args.write:
        replace_section(args.write, "\n".join(text))


def _expected(workload: Path) -> list[int]:
    return json.loads(workload.read_text())["check"]["expected"]


def _measure(python: Path, variant: Variant, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    script = HERE / f"peer_{variant.engine}.py"
    options = [f"--{name}={getattr(args, name)}" for name in ("prompt", "tokens", "threads", "repeats")]
    command = [str(part) for part in (python, script, folder, *options)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{process.stderr[-4000:]}\n{variant.name} failed: {' '.join(command)}")
    return json.loads(process.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(description="Compare llmc with its peers on this machine.")
    parser.add_argument("--model", action="append", choices=list(_TITLES), help="repeatable; default: demo")
    parser.add_argument("--only", action="append", choices=names, help="engine and format; repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: number of physical cores")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for environments, models and results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the section between this page's markers")
    parser.add_argument("--noisy", action="store_true", help="don't wait for a quiet machine; for trials only")
    args = parser.parse_args()
    if args.write and args.noisy:
        parser.error("--write needs a quiet machine: remove --noisy or --write")
    return args


if __name__ == "__main__":
    main()
