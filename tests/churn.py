"""Requests that arrive, end, are cancelled and interrupted at random beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.runtimes.engines.base import Engine
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import Logits
from llmc.runtimes.generate.request import Event, Failed, Finished, Request, Token
from llmc.runtimes.generate.sampling import SamplingParams
from llmc.runtimes.generate.scheduler import Scheduler

Alone = Callable[[Sequence[int], int], list[int]]
"""Prompt and number of tokens -> the tokens of a request that runs alone."""


@dataclass
class Answer:
    """The events of one request."""

    tokens: list[Token] = field(default_factory=list)
    end: Finished | Failed | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token for token in self.tokens]


def collect(events: Iterable[Event], answers: dict[int, Answer]) -> None:
    for event in events:
        answer = answers.setdefault(event.request, Answer())
        assert answer.end is None, "an event after the end"
        if isinstance(event, Token):
            answer.tokens.append(event)
        else:
            answer.end = event


class Interrupted:
    """An engine whose calls are sometimes interrupted, before or after it has run."""

    def __init__(self, engine: Engine, random: np.random.Generator) -> None:
        self.engine, self.random, self.spec = engine, random, engine.spec
        self.interrupts = 0

    @property
    def slots(self) -> int:
        return self.engine.slots

    @property
    def runs(self) -> int:
        return self.engine.runs

    def open_slots(self, count: int) -> None:
        self.engine.open_slots(count)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self.engine.copy_slot(source, target, length)

    def close(self) -> None:
        self.engine.close()

    def forward(self, batch: Batch) -> Logits:
        chance = self.random.random()
        logits = self.engine.forward(batch) if chance > 0.02 else None
        if chance < 0.04:
            self.interrupts += 1
            raise KeyboardInterrupt
        assert logits is not None
        return logits


def check_churn(
    engine: Engine, alone: Alone, seed: int, batch_size: int, *, vocab_size: int, requests: int = 200
) -> int:
    """Serve random requests, and compare each with the same request alone: nothing is lost, doubled or mixed up.

    Returns how many tokens were reused from earlier requests.
    """
    random = np.random.default_rng(seed)
    interrupted = Interrupted(engine, random)
    scheduler = Scheduler(interrupted, batch_size=batch_size, longest_piece=int(random.integers(3, 40)))
    wanted: dict[int, tuple[list[int], int]] = {}
    answers: dict[int, Answer] = {}
    cancelled: dict[int, int] = {}
    history: list[list[int]] = [[3, 1, 4, 1, 5] * 4]
    while len(wanted) < requests or not scheduler.is_idle:
        if len(wanted) < requests and random.random() < 0.5:
            # Some prompts continue others, so that cached beginnings are reused.
            begin = history[random.integers(len(history))] if random.random() < 0.5 else []
            prompt = [*begin, *random.integers(0, vocab_size, random.integers(1, 30)).tolist()]
            count = int(random.integers(1, 14))
            key = "shared" if random.random() < 0.8 else None
            request = scheduler.add(Request(prompt, SamplingParams(max_tokens=count), key))
            wanted[request] = prompt, count
        if wanted and random.random() < 0.05:
            request = int(random.integers(len(wanted)))
            scheduler.cancel(request)
            cancelled.setdefault(request, len(answers.get(request, Answer()).tokens))
        try:
            events = scheduler.step()
        except KeyboardInterrupt:
            continue
        for event in events:
            assert event.request not in cancelled or answers[event.request].end
        collect(events, answers)
        ended = [event.request for event in events if isinstance(event, Finished)]
        histories = [[*wanted[request][0], *answers[request].ids] for request in ended]
        history += [one for one in histories if len(one) <= 50]
    assert interrupted.interrupts > 5 and scheduler.running == scheduler.waiting == 0
    reused = 0
    for request, (prompt, count) in wanted.items():
        answer = answers.get(request, Answer())
        if request in cancelled and not answer.end:
            assert answer.ids == alone(prompt, count)[: cancelled[request]]
            continue
        assert isinstance(answer.end, Finished), answer.end
        assert answer.ids == alone(prompt, count)
        reused += answer.end.reused_tokens
    return reused
