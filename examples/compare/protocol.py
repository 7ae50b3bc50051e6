"""Define the measurements: the same code, workload and clock for all engines.

    pp: prefill speed, prompt tokens per second. The time starts when 512 random tokens are passed to an engine with an
        empty cache. It ends when the first greedy token is known, so it includes the logits of the last position.
    tg: decode speed, 128 tokens / seconds. The time starts at the first greedy token after a prompt of one random
        token. It ends after 128 more decode steps of one token. End-of-text tokens don't stop an engine.

    at: decode speed in a long context, 32 tokens / seconds, after random prompts of several lengths. The time starts at
        the first greedy token after the prompt.

Each runs once unmeasured before the measured repeats. Peers import this file in their own environments, so it uses the
standard library only.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

WORKLOAD = "workload.json"
TOKENS_AT = 32


class Loaded(Protocol):
    """A loaded model."""

    version: str
    weights: list[Path]  # the files that hold graph and weights


class Engine(Loaded, Protocol):
    """A loaded model that generates greedily, one sequence at a time."""

    def reset(self) -> None:
        """Empty the cache. This is not measured."""

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        """Generate `count` greedy tokens after a prompt, past end-of-text tokens.

        Call `on_token` with each token as soon as it is known.
        """


Load = Callable[[Path, int, int], Engine]  # arguments: folder, threads, capacity of the cache in tokens


def run(name: str, load: Load) -> None:
    """Run a peer's main program: load, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=f"Measure {name}; prints one line of JSON.")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--at", type=int, nargs="*", default=[], help="lengths of prompts to decode after")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workload", type=Path, help=f"default: {WORKLOAD} next to MODEL_DIR")
    args = parser.parse_args()
    model = args.model.resolve()
    workload = json.loads((args.workload or model.parent / WORKLOAD).read_text())

    start = time.perf_counter()
    capacity = max([args.prompt + args.tokens, *(length + TOKENS_AT + 1 for length in args.at)])
    engine = load(model, args.threads, capacity)
    load_s = time.perf_counter() - start

    pp, tg = measure(engine, workload["vocab_size"], args.prompt, args.tokens, args.repeats)
    at = {length: decode_after(engine, workload["vocab_size"], length, args.repeats) for length in args.at}
    greedy, following = checks(engine, workload["check"]["prompt"], workload["check"]["expected"])
    result = {
        **describe_engine(name, engine, model, load_s),
        "pp": pp,
        "tg": tg,
        "at": at,
        "greedy": greedy,
        "following": following,
    }
    print(json.dumps(result), flush=True)


def describe_engine(name: str, loaded: Loaded, model: Path, load_s: float) -> dict[str, Any]:
    """Return the part of a result that all measurements have."""
    return {
        "engine": name,
        "version": loaded.version,
        "format": model.name,
        "bytes": sum(path.stat().st_size for path in loaded.weights),
        "load_s": load_s,
        "peak_rss": peak_rss(),
    }


def measure(engine: Engine, vocab: int, prompt: int, tokens: int, repeats: int) -> tuple[list[float], list[float]]:
    """Measure tokens per second of prefill and decode in each repeat.

    One unmeasured repeat comes first.
    """
    chooser = random.Random(0)  # the same tokens for every engine, other tokens in every repeat
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


def decode_after(engine: Engine, vocab: int, length: int, repeats: int) -> list[float]:
    """Measure tokens per second of decode after a prompt of this length, in each repeat.

    One unmeasured repeat comes first.
    """
    chooser = random.Random(length)
    speeds = []
    for _ in range(repeats + 1):
        _, times = timed(engine, chooser.choices(range(vocab), k=length), TOKENS_AT + 1)
        speeds.append(TOKENS_AT / (times[-1] - times[1]))
    return speeds[1:]


def checks(engine: Engine, prompt: list[int], expected: list[int]) -> tuple[list[int], list[int]]:
    """Generate tokens that show if an engine runs the given weights.

    Returns the greedy tokens after the prompt, and the next token after the prompt and each prefix of `expected`. The
    first list can differ from `expected` in all tokens after the first difference. The second measures each token
    separately, so it shows the precision of the weights.
    """
    greedy, _ = timed(engine, prompt, len(expected))
    following = [timed(engine, [*prompt, *expected[:known]], 1)[0][0] for known in range(len(expected))]
    return greedy, following


def timed(engine: Engine, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Generate `count` greedy tokens from an empty cache.

    Returns the tokens, and the seconds since the start: 0, then the time of each token.
    """
    generated: list[int] = []
    times: list[float] = []

    def on_token(token: int) -> None:
        times.append(time.perf_counter())
        generated.append(token)

    engine.reset()
    times.append(time.perf_counter())
    engine.generate(prompt, count, on_token)
    if len(generated) != count:
        raise RuntimeError(f"the engine generated {len(generated)} tokens instead of {count}")
    return generated, [moment - times[0] for moment in times]


def peak_rss() -> int:
    """Peak resident set of this process in bytes.

    `getrusage` would include its parent's memory before exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
