"""What is measured and how: the same code, workload and clock for every engine.

    pp: prompt tokens / seconds from handing 512 random tokens to an empty cache until the first greedy token is there,
        logits of the last position included.
    tg: 128 / seconds from the first greedy token after a prompt of one random token until 128 more have followed,
        each a step of one token through the cache. End-of-text tokens don't end it.

Both run once unmeasured before the measured repeats. Peers run in environments of their own: standard library only.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

WORKLOAD = "workload.json"


class Engine(Protocol):
    """A loaded model that generates greedily, one sequence at a time."""

    version: str
    weights: list[Path]  # the files that hold graph and weights

    def reset(self) -> None:
        """Empty the cache; outside of the clock."""

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        """Greedy tokens after a prompt, `on_token` called with each as soon as it is known; runs past end-of-text."""


Load = Callable[[Path, int, int], Engine]  # folder, threads, tokens that the cache must hold


def run(name: str, load: Load) -> None:
    """The main program of a peer: parse the arguments, load, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=f"Measure {name}; prints one line of JSON.")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workload", type=Path, help=f"default: {WORKLOAD} beside MODEL_DIR")
    args = parser.parse_args()
    model = args.model.resolve()
    workload = json.loads((args.workload or model.parent / WORKLOAD).read_text())

    start = time.perf_counter()
    engine = load(model, args.threads, args.prompt + args.tokens)
    load_s = time.perf_counter() - start

    pp, tg = measure(engine, workload["vocab_size"], args.prompt, args.tokens, args.repeats)
    greedy, following = checks(engine, workload["check"]["prompt"], workload["check"]["expected"])
    result = {
        "engine": name,
        "version": engine.version,
        "format": model.name,
        "bytes": sum(path.stat().st_size for path in engine.weights),
        "pp": pp,
        "tg": tg,
        "load_s": load_s,
        "peak_rss": peak_rss(),
        "greedy": greedy,
        "following": following,
    }
    print(json.dumps(result), flush=True)


def measure(engine: Engine, vocab: int, prompt: int, tokens: int, repeats: int) -> tuple[list[float], list[float]]:
    """Tokens per second of each repeat, prefill and decode, after one unmeasured round of each."""
    chooser = random.Random(0)  # every engine sees the same tokens, every repeat new ones
    pp, tg = [], []
    for repeat in range(-1, repeats):
        _, times = timed(engine, chooser.choices(range(vocab), k=prompt), 1)
        prefill = prompt / times[1]
        _, times = timed(engine, chooser.choices(range(vocab), k=1), tokens + 1)
        decode = tokens / (times[-1] - times[1])
        if repeat >= 0:
            pp.append(prefill)
            tg.append(decode)
    return pp, tg


def checks(engine: Engine, prompt: list[int], expected: list[int]) -> tuple[list[int], list[int]]:
    """What shows that an engine runs these weights: its greedy tokens, and those that follow each prefix of `expected`.

    The first part from `expected` for good where they once differ; the second are as good as the weights' precision.
    """
    greedy, _ = timed(engine, prompt, len(expected))
    following = [timed(engine, [*prompt, *expected[:known]], 1)[0][0] for known in range(len(expected))]
    return greedy, following


def timed(engine: Engine, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """`count` greedy tokens from an empty cache, and seconds since the start: 0, then one for each token."""
    said: list[int] = []
    times: list[float] = []

    def on_token(token: int) -> None:
        times.append(time.perf_counter())
        said.append(token)

    engine.reset()
    times.append(time.perf_counter())
    engine.generate(prompt, count, on_token)
    if len(said) != count:
        raise RuntimeError(f"the engine gave {len(said)} tokens instead of {count}")
    return said, [moment - times[0] for moment in times]


def peak_rss() -> int:
    """Bytes of this process's largest resident set; `getrusage` would count what its parent held before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no VmHWM")
