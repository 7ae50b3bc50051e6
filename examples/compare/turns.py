"""Run measurements in turns (A B C A B C ...), each in its own process.

A machine that warms up or slows down affects all engines equally.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import wait_until_quiet
from prepare import DEFAULT_CACHE, VARIANTS, Variant, prepare
from protocol import WORKLOAD

from llmc.runtimes.engines.cores import physical_cores

TITLES = {
    "demo": "demo (SmolLM2-135M-Instruct)",
    "llama-1b": "1.1B Llama shape, random weights",
}


@dataclass(frozen=True)
class Job:
    """One measurement of an engine.

    Attributes:
        name: what is measured, for messages and the log.
        command: the command; the last line that it prints is JSON.
    """

    model: str
    variant: Variant
    name: str
    command: tuple[str | Path, ...]


@dataclass(frozen=True)
class Model:
    """A model with the folder of each variant.

    Attributes:
        home: folder of the model's files in the cache.
        expected: next tokens of the model in float32, from its workload.
    """

    name: str
    home: Path
    folders: dict[Variant, Path]
    vocab_size: int
    expected: list[int]


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all comparisons have."""
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", action="append", choices=list(TITLES), help="repeatable; default: demo")
    parser.add_argument("--only", action="append", choices=names, help="engine and format; repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: number of physical cores")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for environments, models and results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the section between this page's markers")
    parser.add_argument("--noisy", action="store_true", help="don't wait for a quiet machine; for trials only")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; refuse to write a page with figures of a noisy machine."""
    args = parser.parse_args()
    if args.write and args.noisy:
        parser.error("--write needs a quiet machine: remove --noisy or --write")
    args.cache = args.cache.resolve()
    return args


def selected_variants(args: argparse.Namespace) -> list[Variant]:
    """Return the variants that the command line selects."""
    return [variant for variant in VARIANTS if not args.only or variant.name in args.only]


def prepare_models(args: argparse.Namespace, variants: list[Variant]) -> list[Model]:
    """Make the files of the variants of each model that the command line selects."""
    models = []
    for name in args.model or ["demo"]:
        folders, home = prepare(name, variants, args.cache), args.cache / "models" / name
        workload = json.loads((home / WORKLOAD).read_text())
        models.append(Model(name, home, folders, workload["vocab_size"], workload["check"]["expected"]))
    return models


def run_in_turns(
    jobs: Sequence[Job], args: argparse.Namespace, check: Callable[[Job, dict[str, Any]], None]
) -> dict[Job, list[dict[str, Any]]]:
    """Run every job once per round, and return its results.

    All results are also written to a log in the cache. The first job that fails ends the run.

    Args:
        check: called with each result; raises if it can't be used.
    """
    date = datetime.date.today().isoformat()
    log = args.cache / "results" / f"{datetime.datetime.now():%Y%m%dT%H%M%S}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    results: dict[Job, list[dict[str, Any]]] = {job: [] for job in jobs}
    for number in range(args.rounds):
        for job in jobs:
            if not args.noisy:
                wait_until_quiet()
            try:
                result = run_peer(job.command)
            except RuntimeError as error:
                raise SystemExit(f"{job.name} failed: {error}") from None
            results[job].append(result)
            with log.open("a") as file:
                file.write(json.dumps({"date": date, "model": job.model, "round": number, **result}) + "\n")
            check(job, result)
            print(f"round {number + 1}/{args.rounds} {job.name}", file=sys.stderr, flush=True)
    print(f"Wrote all figures to {log}.", file=sys.stderr)
    return results


def run_peer(command: Sequence[str | Path]) -> dict[str, Any]:
    """Run a peer and parse the last line that it prints."""
    words = [str(part) for part in command]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{process.stderr[-4000:]}\nfailed with status {process.returncode}: {' '.join(words)}")
    return json.loads(process.stdout.splitlines()[-1])
