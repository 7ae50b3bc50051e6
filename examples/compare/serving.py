"""Compare llmc, onnxruntime-genai, llama.cpp and OpenVINO GenAI on many requests at once.

    python examples/compare/serving.py --write docs/performance.md

All engines serve the requests of `llmc bench --workload 64`, with several numbers of requests at once. Every engine
runs in its own environment and process, in turns (turns.py). The figures are medians over the rounds.
serving_protocol.py defines what is measured, and prepare.py how each model is made.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import turns
from environments import HERE, python_of
from machine import describe
from prepare import Variant
from protocol import WORKLOAD
from report import Row, around_section, refuse_other_weights, replace_section, serving_table

from llmc.runtimes.measure.workload import seeded_workload

SECTION = "compare-batches"
_WARM_UP_REQUESTS = 16
_WARM_UP_SEED = 1  # not that of the measured requests, whose prompts must not be in a cache of prefixes


def main() -> None:
    args = _arguments()
    if args.write:
        around_section(args.write, SECTION)  # fail now, not after an hour, if the page has no markers
    variants = turns.selected_variants(args)
    models = turns.prepare_models(args, list(dict.fromkeys([*variants, *(one.for_batches for one in variants)])))
    expected = {model.name: model.expected for model in models}
    jobs: dict[turns.Job, int] = {}
    for model in models:
        requests = write_requests(model.home, model.vocab_size, args.requests)
        jobs |= jobs_of(model, variants, requests, args)

    def check(job: turns.Job, result: dict[str, Any]) -> None:
        refuse_other_weights(Row(job.variant.bits, job.variant.format, [result]), expected[job.model])

    results = turns.run_in_turns(list(jobs), args, check)
    versions = {rounds[0]["engine"]: rounds[0]["version"] for rounds in results.values()}
    text = [
        f"`examples/compare/serving.py`, {datetime.date.today().isoformat()}, {describe(args.threads)}. "
        f"{args.requests} requests. Medians of {args.rounds} rounds, with the slowest and the fastest round. "
        f"{', '.join(f'{engine} {version}' for engine, version in versions.items())}."
    ]
    for model in models:
        measured = [
            (jobs[job], Row(job.variant.bits, job.variant.format, rounds))
            for job, rounds in results.items()
            if job.model == model.name
        ]
        text += ["", f"#### {turns.TITLES[model.name]}", "", serving_table(measured)]
    print("\n".join(text))
    if args.write:
        replace_section(args.write, "\n".join(text), SECTION)


def write_requests(home: Path, vocab_size: int, count: int) -> Path:
    """Write the requests that are measured, those of the warm-up, and the prompts of the checks."""
    target = home / "requests.json"
    check = json.loads((home / WORKLOAD).read_text())["check"]
    prompts = [[*check["prompt"], *check["expected"][:known]] for known in range(len(check["expected"]))]
    parts = {"measured": (count, 0), "warm_up": (_WARM_UP_REQUESTS, _WARM_UP_SEED)}
    requests = {name: _requests(number, vocab_size, seed) for name, (number, seed) in parts.items()}
    target.write_text(json.dumps({**requests, "checks": prompts}))
    return target


def _requests(count: int, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    arrivals = seeded_workload(count, vocab_size, seed=seed)
    return [([int(token) for token in arrival.prompt], arrival.new_tokens) for arrival in arrivals]


def jobs_of(
    model: turns.Model,
    variants: Sequence[Variant],
    requests: Path,
    args: argparse.Namespace,
    python_of: Callable[[str, Path], Path] = python_of,
) -> dict[turns.Job, int]:
    """Return the jobs of a model, each with its concurrency."""
    jobs = {}
    for concurrency in args.concurrency:
        options = [f"--requests={requests}", f"--concurrency={concurrency}", f"--threads={args.threads}"]
        for variant in variants:
            script = HERE / f"serving_peer_{variant.engine}.py"
            folder = model.folders[variant.for_batches if concurrency > 1 else variant]
            command = (python_of(variant.engine, args.cache), script, folder, *options)
            jobs[turns.Job(model.name, variant, f"{model.name} {variant.name}, {concurrency} at once", command)] = (
                concurrency
            )
    return jobs


def _arguments() -> argparse.Namespace:
    parser = turns.parser("Compare llmc with its peers on many requests at once.")
    parser.add_argument("--requests", type=int, default=64, help="number of requests; default: 64")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 8, 16], metavar="N", help="requests at once; default: 1 8 16"
    )
    return turns.parse(parser)


if __name__ == "__main__":
    main()
