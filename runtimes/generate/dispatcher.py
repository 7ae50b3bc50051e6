"""Run one scheduler for several readers, each of which gets the events of its own requests."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Collection, Iterator
from typing import TYPE_CHECKING, TypeVar

from .interrupts import deferred_interrupts
from .request import Event, Failed, Finished, Request
from .scheduler import Scheduler

if TYPE_CHECKING:
    import asyncio  # imported where it is used: it takes a third of the time of importing llmc

_Reader = TypeVar("_Reader", Iterator[Event], AsyncIterator[Event])


class Dispatcher:
    """Steps a scheduler while a reader waits, and keeps the events of the others until they read them.

    Readers may be generators that take turns, or tasks of one event loop; not several threads.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._events: list[Event] = []
        self._cancelled: set[int] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stepping: asyncio.Lock

    def add(self, request: Request) -> int:
        """Queue a request; see `Scheduler.add`."""
        return self._scheduler.add(request)

    def cancel(self, requests: Collection[int]) -> None:
        """End requests without further events, at the next step: one may be running in another thread."""
        self._cancelled.update(requests)

    def forget(self) -> None:
        """Forget what slots keep of finished requests; see `Scheduler.forget`."""
        self._scheduler.forget()

    def events(self, requests: Collection[int]) -> Iterator[Event]:
        """Return the events of requests until the last has ended; cancel them if the reader stops earlier."""
        unfinished = set(requests)
        return self._cancel_unread(self._read(unfinished), unfinished)

    def events_async(self, requests: Collection[int]) -> AsyncIterator[Event]:
        """Return the events of requests as `events` does; other tasks run while the engine computes."""
        unfinished = set(requests)
        return self._cancel_unread(self._read_async(unfinished), unfinished)

    def _cancel_unread(self, reader: _Reader, unfinished: set[int]) -> _Reader:
        """Cancel what is unfinished when the reader is gone, even if it never began to read."""
        weakref.finalize(reader, self.cancel, unfinished)
        return reader

    def _read(self, unfinished: set[int]) -> Iterator[Event]:
        while unfinished:
            while not (event := self._take(unfinished)):
                self._step(unfinished)
            yield event

    async def _read_async(self, unfinished: set[int]) -> AsyncIterator[Event]:
        while unfinished:
            while not (event := self._take(unfinished)):
                await self._step_async(unfinished)
            yield event

    def _take(self, unfinished: set[int]) -> Event | None:
        """Remove and return the oldest event of these requests, or None; discard a request with its last event."""
        for index, event in enumerate(self._events):
            if event.request in unfinished:
                if isinstance(event, (Finished, Failed)):
                    unfinished.discard(event.request)
                return self._events.pop(index)
        return None

    def _step(self, unfinished: set[int]) -> None:
        with deferred_interrupts():
            self._prepare(unfinished)
            self._events += self._scheduler.step()

    async def _step_async(self, unfinished: set[int]) -> None:
        """Step in another thread, one task at a time; all else happens in the thread of the event loop."""
        import asyncio

        async with self._lock():
            if any(event.request in unfinished for event in self._events):
                return  # another task has stepped
            self._prepare(unfinished)
            step = asyncio.ensure_future(asyncio.to_thread(self._scheduler.step))
            try:
                self._events += await asyncio.shield(step)
            except asyncio.CancelledError:
                # The thread can't be stopped, and nobody else may step before it ends.
                self._events += await step
                raise

    def _prepare(self, unfinished: set[int]) -> None:
        """Cancel the requests whose readers are gone."""
        cancelled, self._cancelled = self._cancelled, set()
        for request in cancelled:
            self._scheduler.cancel(request)
        self._events = [event for event in self._events if event.request not in cancelled]
        if self._scheduler.is_idle:
            raise RuntimeError(f"The requests {unfinished} are not running.")

    def _lock(self) -> asyncio.Lock:
        """Return the lock of the running event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._stepping = loop, asyncio.Lock()
        return self._stepping
