"""Continuous batching: requests come and go while others run.

Each step runs the engine once: the next token of every sequence that decodes, and pieces of the prompts of new ones.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection

import numpy as np

from ...errors import LlmcError
from ..engines.base import Engine
from ..engines.batch import Batch, NewTokens, Wanted
from ..engines.logits import Logits
from .interrupts import deferred_interrupts
from .pacing import Pacing
from .request import Event, Failed, Request
from .sequence import TokenSequence
from .slots import Slots
from .stopping import Decoder


class Scheduler:
    """Continues requests with one engine; for one thread at a time.

    The output of a request doesn't depend on the others. After an interrupt or an error, the requests go on with the
    next step.

    Args:
        batch_size: the largest number of requests that run at once; others wait.
        eos_ids: the model's own end tokens.
        decoder: turns tokens into text; with None, texts are empty.
        longest_piece: the most prompt tokens of a step.
        clock: returns seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_size: int = 8,
        eos_ids: Collection[int] = (),
        decoder: Decoder | None = None,
        longest_piece: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine = engine
        self._eos_ids = eos_ids
        self._decoder = decoder
        self._clock = clock
        self._pacing = Pacing(longest_piece)
        self._slots = Slots(engine, batch_size)
        self._waiting: deque[TokenSequence] = deque()
        self._events: list[Event] = []
        self._next_id = 0

    @property
    def waiting(self) -> int:
        """The number of requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return len(self._slots)

    @property
    def slots(self) -> dict[int, int]:
        """The engine's slot of each running request."""
        return {sequence.id: self._slots[sequence] for sequence in self._slots}

    @property
    def is_idle(self) -> bool:
        """True if no request is unfinished and no event is left."""
        return not (self._waiting or len(self._slots) or self._events)

    def add(self, request: Request) -> int:
        """Queue a request; return its id.

        A sequence never has more tokens (prompt and output together) than the engine's `max_seq_len`.

        Raises:
            LlmcError: PROMPT_EMPTY, PROMPT_INVALID, PROMPT_TOO_LONG, SAMPLING_INVALID, TOKENIZER_MISSING.
        """
        sequence = TokenSequence(self._next_id, request, self.engine.spec, self._eos_ids, self._decoder)
        self._next_id += 1
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, request: int) -> None:
        """End a request without further events; does nothing if it has ended."""
        with deferred_interrupts():
            self._events = [event for event in self._events if event.request != request]
            for sequence in [*self._waiting, *self._slots]:
                if sequence.id == request:
                    self._drop(sequence)

    def forget(self) -> None:
        """Forget what slots keep of finished requests; call it after another use of the engine."""
        self._slots.forget()

    def step(self) -> list[Event]:
        """Run the engine once and return what happened; [] if there is nothing to do."""
        # An interrupt would be raised at the end of the block: the next step returns the events then.
        with deferred_interrupts():
            self._admit()
            if parts := self._parts():
                self._run(parts)
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Give waiting requests slots, in the order in which they came."""
        if self._waiting and self._slots.free:
            self._slots.reserve(len(self._waiting))
        budget = self._pacing.budget(len(self._slots.decoding)) - sum(s.length - s.held for s in self._slots.reading)
        while self._waiting and self._slots.free and budget > 0:
            sequence = self._waiting.popleft()
            self._slots.add(sequence)
            budget -= sequence.length - sequence.held

    def _parts(self) -> dict[TokenSequence, NewTokens]:
        """Choose the new tokens of each sequence for the next call."""
        parts = {}
        for sequence in self._slots.decoding:
            parts[sequence] = self._part(sequence, 1)
        budget = self._pacing.budget(len(self._slots.decoding))
        for sequence in self._slots.reading:
            has_begun = sequence.held > sequence.reused
            size = self._pacing.piece(sequence.length - sequence.held, budget, has_begun)
            if size:
                parts[sequence] = self._part(sequence, size)
            budget -= size
            if sequence.held + size < sequence.length:
                break  # the oldest first: the next piece is of the same prompt
        return parts

    def _part(self, sequence: TokenSequence, size: int) -> NewTokens:
        end = sequence.held + size
        wanted: Wanted = "last" if end == sequence.length else "none"
        return NewTokens(sequence.ids[sequence.held : end], sequence.held, self._slots[sequence], wanted)

    def _run(self, parts: dict[TokenSequence, NewTokens]) -> None:
        began = self._clock()
        try:
            logits = self._forward(parts)
        except LlmcError as error:
            self._run_one_by_one(parts, error)
            return
        decoding = len(self._slots.decoding)
        self._pacing.observe(decoding, sum(len(p.tokens) for p in parts.values()) - decoding, self._clock() - began)
        self._advance(parts, logits)

    def _forward(self, parts: dict[TokenSequence, NewTokens]) -> Logits:
        try:
            return self.engine.forward(Batch.of(*parts.values()))
        except LlmcError:
            raise
        except BaseException:
            # Slots may hold more positions than their sequences know, and not all engines can go back from there.
            for sequence in parts:
                sequence.restarted_at = -1
            raise

    def _run_one_by_one(self, parts: dict[TokenSequence, NewTokens], error: LlmcError) -> None:
        """Find the sequences of a batch that the engine can't continue; they start again, or fail."""
        for sequence, part in parts.items():
            logits, its_error = None, error
            if len(parts) > 1:
                try:
                    logits = self._forward({sequence: part._replace(slot=self._slots[sequence])})
                except LlmcError as own:
                    its_error = own
            if logits is not None:
                self._advance({sequence: part}, logits)
            elif part.start and sequence.restarted_at != sequence.length:
                self._slots.start_again(sequence)
            else:
                self._fail(sequence, its_error)

    def _advance(self, parts: dict[TokenSequence, NewTokens], logits: Logits) -> None:
        """Append the next token of each sequence whose known tokens have all been computed."""
        best = logits.argmax() if any(sequence.is_greedy for sequence in parts) else None
        advanced: dict[TokenSequence, LlmcError | None] = {}
        index = 0
        try:
            for sequence, part in parts.items():
                if part.logits == "last":
                    held = sequence.length
                    advanced[sequence] = self._append(sequence, logits, index, best)
                    sequence.held = held
                    index += 1
                else:
                    sequence.held += len(part.tokens)
        finally:  # a tokenizer may raise anything: sequences after it are computed again
            self._settle(advanced)

    def _append(self, sequence: TokenSequence, logits: Logits, index: int, best: np.ndarray | None) -> LlmcError | None:
        try:
            if sequence.is_greedy and best is not None and best[index] >= 0:
                token = sequence.append(int(best[index]))
            else:
                token = sequence.append_sampled(logits.numpy()[index])
        except LlmcError as error:
            return error
        self._events.append(token)
        if token.finish_reason is not None:
            self._events.append(sequence.finished())
        return None

    def _settle(self, advanced: dict[TokenSequence, LlmcError | None]) -> None:
        """Free the slots of sequences that have ended; let those with their first token decode."""
        # Those in the last slots first: fewer others must move.
        for sequence, error in reversed(advanced.items()):
            if error is not None:
                self._fail(sequence, error)
            elif sequence.finish_reason is not None:
                self._slots.remove(sequence)
        for sequence in [one for one in self._slots.reading if one in advanced]:
            self._slots.start_decoding(sequence)

    def _fail(self, sequence: TokenSequence, error: LlmcError) -> None:
        self._slots.remove(sequence, keep=False)
        self._events.append(Failed(sequence.id, error))

    def _drop(self, sequence: TokenSequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._slots.remove(sequence)
