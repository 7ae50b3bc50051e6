"""Define the measurement of many requests at once: the same requests, checks and clock for all engines.

All requests are there at the beginning, and an engine serves at most `concurrency` of them at a time. It must generate
exactly the requested number of tokens for each, past end-of-text tokens.

    tokens/s: generated tokens / seconds, from the beginning to the last token.
    ttft: time from the beginning to the first token of a request, with the time that it waits for others.

Other requests run once unmeasured before. Afterwards, the engine serves the checks of protocol.py at once: the next
token after each prefix of the expected text. Peers import this file in their own environments, so it uses the standard
library only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from protocol import describe_engine

OnToken = Callable[[int, int], None]  # arguments: index of the request, token


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens to generate after it."""

    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Served:
    """The measured service of requests.

    Attributes:
        tokens: generated tokens.
        seconds: from the beginning to the last token.
        ttft_ms: median over the requests of the time from the beginning to the first token.
    """

    tokens: int
    seconds: float
    ttft_ms: float


class Server:
    """A loaded model that serves requests greedily.

    Attributes:
        version: version of the engine.
        weights: the files that hold graph and weights.
        concurrency: the largest number of requests that it serves at once.
    """

    version: str
    weights: list[Path]
    concurrency: int

    def serve(self, requests: Sequence[Request], on_token: OnToken) -> None:
        """Serve requests that are all there at the beginning.

        Call `on_token` with each token as soon as it is known.
        """
        raise NotImplementedError

    def measure(self, requests: Sequence[Request]) -> Served:
        """Serve requests and measure."""
        return timed(self, requests)[1]


Load = Callable[[Path, int, int, int], Server]  # arguments: folder, threads, concurrency, tokens of the longest request


def run(name: str, load: Load) -> None:
    """Run a peer's main program: load, serve, print one line of JSON."""
    parser = argparse.ArgumentParser(description=f"Measure {name} on many requests; prints one line of JSON.")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--requests", type=Path, required=True, metavar="FILE", help="serving.py writes it")
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    workload = json.loads(args.requests.read_text())
    warm_up, measured = ([Request(*one) for one in workload[part]] for part in ("warm_up", "measured"))
    checks = [Request(prompt, 1) for prompt in workload["checks"]]
    longest = max(len(one.prompt) + one.new_tokens for one in (*warm_up, *measured, *checks))

    model = args.model.resolve()
    start = time.perf_counter()
    server = load(model, args.threads, args.concurrency, longest)
    load_s = time.perf_counter() - start
    timed(server, warm_up)
    served = server.measure(measured)
    requested = sum(one.new_tokens for one in measured)
    if served.tokens != requested:
        raise RuntimeError(f"the engine generated {served.tokens} tokens instead of {requested}")
    following = [tokens[0] for tokens in timed(server, checks)[0]]
    result = {
        **describe_engine(name, server, model, load_s),
        **asdict(served),
        "concurrency": args.concurrency,
        "requests": len(measured),
        "tokens_per_s": [served.tokens / served.seconds],
        "following": following,
    }
    print(json.dumps(result), flush=True)


def timed(server: Server, requests: Sequence[Request]) -> tuple[list[list[int]], Served]:
    """Serve requests; return the tokens of each, and the times.

    Raises:
        RuntimeError: a request has another number of tokens than requested, or more requests than `concurrency` have
            been begun and are not complete.
    """
    generated: list[list[int]] = [[] for _ in requests]
    first = [0.0] * len(requests)
    running, most = set(), 0
    last = start = time.perf_counter()

    def on_token(index: int, token: int) -> None:
        nonlocal last, most
        last = time.perf_counter()
        if not generated[index]:
            first[index] = last - start
            running.add(index)
            most = max(most, len(running))
        generated[index].append(token)
        if len(generated[index]) == requests[index].new_tokens:
            running.remove(index)

    server.serve(requests, on_token)
    for index, (request, tokens) in enumerate(zip(requests, generated, strict=True)):
        if len(tokens) != request.new_tokens:
            raise RuntimeError(
                f"the engine generated {len(tokens)} tokens instead of {request.new_tokens} for request {index}"
            )
    if most > server.concurrency:
        raise RuntimeError(f"the engine serves {most} requests at once instead of {server.concurrency}")
    count = sum(len(tokens) for tokens in generated)
    return generated, Served(count, last - start, 1000 * statistics.median(first))
