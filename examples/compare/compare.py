"""Compare llmc, onnxruntime-genai, llama.cpp and OpenVINO GenAI.

All run the same weights, and one table has their speeds.

    python examples/compare/compare.py --model demo --model llama-1b --rounds 5 --write docs/performance.md

Every engine runs in its own environment and process, in turns (turns.py). The figures are medians over the rounds of
each round's median repeat. protocol.py defines what is measured, and prepare.py how each model is made.
"""

from __future__ import annotations

import argparse
import datetime
from typing import Any

import turns
from environments import HERE, python_of
from machine import describe
from report import Row, around_section, context_table, refuse_other_weights, replace_section, table


def main() -> None:
    args = _arguments()
    if args.write:
        around_section(args.write)  # fail now, not after hours, if the page has no markers
    models = turns.prepare_models(args, turns.selected_variants(args))
    expected = {model.name: model.expected for model in models}
    options = [f"--{name}={getattr(args, name)}" for name in ("prompt", "tokens", "threads", "repeats")]
    options += ["--at", *map(str, args.at)]
    jobs = [
        turns.Job(
            model.name,
            variant,
            f"{model.name} {variant.name}",
            (python_of(variant.engine, args.cache), HERE / f"peer_{variant.engine}.py", folder, *options),
        )
        for model in models
        for variant, folder in model.folders.items()
    ]

    def check(job: turns.Job, result: dict[str, Any]) -> None:
        refuse_other_weights(Row(job.variant.bits, job.variant.format, [result]), expected[job.model])

    results = turns.run_in_turns(jobs, args, check)
    text = [
        f"`examples/compare/compare.py`, {datetime.date.today().isoformat()}, {describe(args.threads)}. Medians of "
        f"{args.rounds} rounds of {args.repeats} repeats, with the slowest and the fastest round."
    ]
    for model in models:
        rows = [
            Row(job.variant.bits, job.variant.format, rounds)
            for job, rounds in results.items()
            if job.model == model.name
        ]
        text += ["", f"### {turns.TITLES[model.name]}", "", table(rows, model.expected, args.prompt, args.tokens)]
        if args.at:
            text += ["", "Tokens a second after a prompt of so many tokens, and the ratio to the best peer:"]
            text += ["", context_table(rows)]
    print("\n".join(text))
    if args.write:
        replace_section(args.write, "\n".join(text))


def _arguments() -> argparse.Namespace:
    parser = turns.parser("Compare llmc with its peers on this machine.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--at", type=int, nargs="*", default=[128, 512, 1024, 1900], metavar="N",
        help="lengths of prompts to decode after; default: 128 512 1024 1900",
    )  # fmt: skip
    return turns.parse(parser)


if __name__ == "__main__":
    main()
