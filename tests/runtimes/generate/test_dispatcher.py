"""Readers of one scheduler get the events of their own requests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import numpy as np
import pytest
from fake_engines import ToyEngine, hashed

from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.generate.dispatcher import Dispatcher
from llmc.runtimes.generate.request import Event, Finished, Request, Token
from llmc.runtimes.generate.sampling import SamplingParams
from llmc.runtimes.generate.scheduler import Scheduler


def dispatcher(engine: ToyEngine | None = None) -> Dispatcher:
    return Dispatcher(Scheduler(engine or ToyEngine(hashed()), batch_size=4))


def request(first: int, count: int = 5) -> Request:
    return Request([first, 2, 3], SamplingParams(max_tokens=count))


def want(first: int, count: int = 5) -> list[int]:
    history, rule = [first, 2, 3], hashed()
    for _ in range(count):
        history.append(int(np.float32(rule(tuple(history))).argmax()))
    return history[3:]


def ids(events: Sequence[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, Token)]


def test_readers_take_turns() -> None:
    shared = dispatcher()
    first = shared.events([shared.add(request(1))])
    second = shared.events([shared.add(request(4))])
    got: tuple[list[Event], list[Event]] = [next(first)], [next(second), next(second)]
    for events, rest in zip(got, (first, second), strict=True):
        events.extend(rest)
    assert [ids(events) for events in got] == [want(1), want(4)]
    assert all(isinstance(events[-1], Finished) for events in got)


def test_several_requests_of_one_reader_come_in_order() -> None:
    shared = dispatcher()
    requests = [shared.add(request(1)), shared.add(request(4, 2))]
    events = list(shared.events(requests))
    assert [event.request for event in events[:4]] == [*requests, *requests]
    assert ids([event for event in events if event.request == requests[1]]) == want(4, 2)


@pytest.mark.parametrize("read", [0, 1])
def test_a_reader_that_leaves_cancels_its_request(read: int) -> None:
    engine = ToyEngine(hashed())
    shared = dispatcher(engine)
    left, stays = shared.events([shared.add(request(1))]), shared.events([shared.add(request(4))])
    for _ in range(read):
        next(left)
    del left
    gc.collect()
    assert ids(list(stays)) == want(4)
    assert sum(len(call.slots) for call in engine.calls) == 5 + read


def test_an_interrupt_ends_its_reader_and_no_other() -> None:
    class Interrupted(ToyEngine):
        def forward(self, batch: Batch) -> HostLogits:
            logits = super().forward(batch)
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return logits

    shared = dispatcher(Interrupted(hashed()))
    first, second = (shared.events([shared.add(request(number))]) for number in (1, 4))
    got = [next(second)]
    with pytest.raises(KeyboardInterrupt):
        list(first)
    assert ids([*got, *second]) == want(4)


def test_a_request_that_is_not_running_has_no_reader() -> None:
    with pytest.raises(RuntimeError, match=r"\{5\}"):
        next(dispatcher().events([5]))


def test_tasks_share_batches() -> None:
    engine = ToyEngine(hashed())
    shared = dispatcher(engine)

    async def read(first: int) -> list[Event]:
        return [event async for event in shared.events_async([shared.add(request(first))])]

    async def run() -> list[list[Event]]:
        return await asyncio.gather(*(read(first) for first in range(4)))

    for _ in range(2):  # in another event loop, too
        engine.calls.clear()
        assert [ids(events) for events in asyncio.run(run())] == [want(first) for first in range(4)]
        assert len(engine.calls) <= 7


def test_a_cancelled_task_frees_its_slot_and_others_go_on() -> None:
    shared = dispatcher()

    async def read(first: int, stop: asyncio.Event) -> list[Event]:
        events = []
        async for event in shared.events_async([shared.add(request(first, 30))]):
            events.append(event)
            if len(events) == 3:
                stop.set()
        return events

    async def run() -> list[Event]:
        stop = asyncio.Event()
        tasks = [asyncio.create_task(read(first, stop)) for first in (1, 4)]
        await stop.wait()
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        return await tasks[1]

    assert ids(asyncio.run(run())) == want(4, 30)
