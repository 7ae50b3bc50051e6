"""The contract of an engine: one function per clause. A test runs them for each engine and kind of artifact.

Each clause takes a `Subject`. `CLAUSES` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from llmc.errors import LlmcError
from llmc.runtimes.engines.base import Engine
from llmc.runtimes.engines.batch import Batch, NewTokens, Wanted

LENGTH = 40
Clause = Callable[["Subject"], None]


@dataclass
class Subject:
    """An engine under test.

    Attributes:
        tokens: unlike sequences, int64 [4, LENGTH].
        tolerance: the largest error of logits that other kernels or another order of sums may cause: the root mean
            square of the difference over that of the logits.
        break_run: makes the engine fail with the given exception in its second graph run from now on.
        batches_steps: one graph run serves a token of each of several sequences.
        mixes: such a run may have several tokens of one more sequence.
        alone: logits [4, LENGTH, V] of each sequence, run alone and at once.
    """

    engine: Engine
    tokens: np.ndarray
    tolerance: float
    break_run: Callable[[BaseException], AbstractContextManager[None]]
    batches_steps: bool = True
    mixes: bool = False
    alone: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.engine.open_slots(1)
        self.alone = np.stack([self.run(NewTokens(sequence, 0, 0, "all")) for sequence in self.tokens])

    def run(self, *parts: NewTokens) -> np.ndarray:
        return self.engine.forward(Batch.of(*parts)).numpy().copy()

    def part(self, sequence: int, start: int, end: int, slot: int, logits: Wanted = "all") -> NewTokens:
        """Tokens from `start` to `end` of one of the sequences."""
        return NewTokens(self.tokens[sequence, start:end], start, slot, logits)

    def hold(self, sequence: int, length: int, slot: int) -> None:
        """Fill a slot with the beginning of a sequence."""
        if length:
            self.run(self.part(sequence, 0, length, slot, "none"))

    def back(self, most: int) -> int:
        """The number of positions that a slot can go back; `most` if there is no limit."""
        rollback = self.engine.spec.rollback
        return most if rollback is None else rollback

    def close(self, got: np.ndarray, *wanted: np.ndarray) -> None:
        """Compare logits with those of sequences that ran alone."""
        want = np.concatenate(wanted)
        assert got.shape == want.shape and got.dtype == np.float32
        error = np.sqrt(np.square(got - want).mean(1) / np.square(want).mean(1))
        assert error.max(initial=0) <= self.tolerance, f"logits are off by {error.max():.2g}"

    @contextmanager
    def refused(self, code: str) -> Iterator[None]:
        with pytest.raises(LlmcError) as caught:
            yield
        assert caught.value.code == code and caught.value.hint


@contextmanager
def broken_runs(kind: type[Any], error: BaseException) -> Iterator[None]:
    """Let the second call of a class's `run` be its last: it has written into the caches."""
    calls, run = iter([False, True]), kind.run

    def breaks(self: Any, *arguments: Any) -> np.ndarray:
        logits = run(self, *arguments)
        if next(calls, True):
            raise error
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run", breaks)
        yield


# Where a token stands and what came before it is all that counts ------------------------------------------------------


def a_prompt_in_pieces(subject: Subject) -> None:
    subject.engine.open_slots(1)
    for sizes in [(1,) * LENGTH, (3, 20, 1, 16), (25, 15), (15, 25)]:
        start = 0
        for size in sizes:
            got = subject.run(subject.part(0, start, start + size, 0))
            subject.close(got, subject.alone[0, start : start + size])
            start += size
        assert start == LENGTH


def steps_of_sequences_in_any_slots(subject: Subject) -> None:
    """At different positions; in any order and with gaps."""
    for slots in [(0, 1, 2), (2, 0, 1), (5, 1, 3), (3, 4, 0)]:
        subject.engine.open_slots(6)
        held = np.array([7, 19, 2])
        for sequence, (slot, length) in enumerate(zip(slots, held, strict=True)):
            subject.hold(sequence, length, slot)
        for _ in range(15):
            got = subject.engine.forward(Batch.step(subject.tokens[[0, 1, 2], held], held, np.array(slots))).numpy()
            subject.close(got, subject.alone[[0, 1, 2], held])
            held += 1


def several_tokens_of_several_sequences(subject: Subject) -> None:
    """Different numbers of them in one call, after different positions, in slots with gaps."""
    subject.engine.open_slots(6)
    slots, held, counts = (4, 0, 5, 2), (9, 1, 21, 0), (3, 12, 1, 17)
    for _ in range(2):  # the second time as new sequences in the same slots
        for sequence in range(4):
            subject.hold(sequence, held[sequence], slots[sequence])
        ends = [start + count for start, count in zip(held, counts, strict=True)]
        got = subject.run(*(subject.part(i, held[i], ends[i], slots[i]) for i in range(4)))
        subject.close(got, *(subject.alone[i, held[i] : ends[i]] for i in range(4)))
        step = subject.run(*(subject.part(i, ends[i], ends[i] + 1, slots[i]) for i in (2, 0, 3, 1)))
        subject.close(step, *(subject.alone[i, ends[i] : ends[i] + 1] for i in (2, 0, 3, 1)))


def other_sequences_do_not_matter(subject: Subject) -> None:
    """To the last bit, whatever tokens they have."""
    subject.engine.open_slots(3)

    def mine(other: int) -> np.ndarray:
        for slot, sequence in enumerate((other, 0, other)):
            subject.hold(sequence, 18, slot)
        got = [subject.run(*(subject.part(s, 18, 19, slot) for slot, s in enumerate((other, 0, other))))[1]]
        parts = [subject.part(s, 19, 22, slot) for slot, s in enumerate((other, 0, other))]
        return np.stack([*got, *subject.run(*parts)[3:6]])

    assert np.array_equal(mine(1), mine(2))


def only_wanted_logits(subject: Subject) -> None:
    subject.engine.open_slots(3)
    got = subject.run(
        subject.part(0, 0, 20, 0, "none"), subject.part(1, 0, 1, 1, "last"), subject.part(2, 0, 7, 2, "last")
    )
    subject.close(got, subject.alone[1, :1], subject.alone[2, 6:7])
    batch = Batch.of(subject.part(0, 20, 25, 0), subject.part(1, 1, 2, 1), subject.part(2, 7, 8, 2))
    got = subject.engine.forward(replace(batch, wanted=np.array([0, 3, 6]))).numpy()
    subject.close(got, subject.alone[0, [20, 23]], subject.alone[2, 7:8])
    assert subject.run(subject.part(0, 25, 26, 0, "none")).shape == (0, subject.engine.spec.vocab_size)
    subject.close(subject.run(subject.part(0, 26, 27, 0)), subject.alone[0, 26:27])
    logits = subject.engine.forward(Batch.of(subject.part(0, 27, 29, 0)))
    values = logits.numpy()
    assert logits.argmax().tolist() == values.argmax(1).tolist() == logits.top_k(3)[0][:, 0].tolist()


def the_last_position(subject: Subject) -> None:
    subject.engine.open_slots(1)
    most = subject.engine.spec.max_seq_len
    sequence = np.resize(subject.tokens.reshape(-1), most)
    logits = subject.run(NewTokens(sequence, 0, 0, "all"))
    subject.close(subject.run(NewTokens(sequence[-1:], most - 1, 0, "all")), logits[-1:])


# Slots ----------------------------------------------------------------------------------------------------------------


def open_slots_keep_their_content(subject: Subject) -> None:
    subject.engine.open_slots(2)
    subject.hold(0, 20, 0)
    subject.hold(1, 20, 1)
    for count in (4, 3, 2):
        subject.engine.open_slots(count)
        assert subject.engine.slots == count
        got = subject.run(*(subject.part(i, 24 - count, 25 - count, i) for i in (0, 1)))
        subject.close(got, *(subject.alone[i, 24 - count : 25 - count] for i in (0, 1)))
    subject.engine.open_slots(1)
    subject.engine.open_slots(2)
    subject.close(
        subject.run(subject.part(0, 23, 24, 0), subject.part(1, 0, 9, 1)), *_two(subject, (0, 23, 24), (1, 0, 9))
    )


def a_copy_continues_on_its_own(subject: Subject) -> None:
    subject.engine.open_slots(3)
    for held in (5, 30):
        subject.hold(0, held, 2)
        subject.hold(1, 12, 0)
        subject.engine.copy_slot(2, 0, held)
        got = subject.run(subject.part(0, held, held + 1, 0), NewTokens(subject.tokens[1, :1], held, 2, "none"))
        subject.close(got, subject.alone[0, held : held + 1])
        subject.engine.copy_slot(0, 0, held + 1)
        subject.close(subject.run(subject.part(0, held + 1, held + 4, 0)), subject.alone[0, held + 1 : held + 4])
    for end in (10, 30):
        kept = end - subject.back(5)
        subject.hold(1, 12, 0)
        subject.hold(0, kept, 2)
        subject.run(NewTokens(subject.tokens[1, kept:end], kept, 2, "none"))
        subject.engine.copy_slot(2, 0, kept)
        if subject.engine.spec.rollback is not None:
            with subject.refused("ROLLBACK_TOO_FAR"):
                subject.run(subject.part(0, kept - 1, kept, 0))
        subject.close(subject.run(subject.part(0, kept, kept + 3, 0)), subject.alone[0, kept : kept + 3])
    with subject.refused("SLOT_CLOSED"):
        subject.engine.copy_slot(0, 3, 1)


def going_back(subject: Subject) -> None:
    """As far as the spec says, from the furthest position that the slot has held, and to the beginning."""
    subject.engine.open_slots(1)
    rollback = subject.engine.spec.rollback
    for back in {1, subject.back(20)}:
        subject.hold(0, 30 - back, 0)
        subject.run(NewTokens(subject.tokens[1, :back], 30 - back, 0, "none"))
        subject.close(subject.run(subject.part(0, 30 - back, 32, 0)), subject.alone[0, 30 - back : 32])
    if rollback is not None:
        least = 32 - rollback
        for start, end in ((least, least + 1), (least + 1, 33)):
            with subject.refused("ROLLBACK_TOO_FAR"):
                subject.run(subject.part(0, least - 1, 33, 0))
            # The first time with one new token: the slot ends earlier then, but has lost as many positions as before.
            subject.close(subject.run(subject.part(0, start, end, 0)), subject.alone[0, start:end])
    subject.close(subject.run(subject.part(2, 0, 5, 0)), subject.alone[2, :5])


def going_back_over_drafts(subject: Subject) -> None:
    """Calls bring a token and drafts after it, more or fewer of them wrong; each call is also made twice."""
    subject.engine.open_slots(2)
    count = subject.back(5)
    held = right = 3
    subject.hold(0, held, 1)
    while held + count < LENGTH:
        right = right % count + 1
        new = np.concatenate((subject.tokens[0, held : held + right], subject.tokens[1, held + right : held + count]))
        for _ in range(2):
            got = subject.run(NewTokens(new, held, 1, "all"))
            subject.close(got[:right], subject.alone[0, held : held + right])
        held += right


# Refusals and failures ------------------------------------------------------------------------------------------------


def what_is_refused_changes_nothing(subject: Subject) -> None:
    subject.engine.open_slots(2)
    spec = subject.engine.spec
    subject.hold(0, 20, 0)
    subject.hold(1, 8, 1)
    other = subject.part(1, 8, 9, 1)
    wrong = [
        ("SEQUENCE_TOO_LONG", NewTokens(subject.tokens[0, :20], spec.max_seq_len - 19, 0)),
        ("TOKEN_UNKNOWN", NewTokens([spec.vocab_size], 20, 0)),
        ("TOKEN_UNKNOWN", NewTokens([-1], 20, 0)),
        ("SLOT_CLOSED", NewTokens([5], 0, 2)),
        ("BATCH_INVALID", NewTokens([5], -1, 0)),
        ("BATCH_INVALID", NewTokens([], 20, 0)),
        ("BATCH_INVALID", NewTokens([5], 20, 1)),
    ]
    for code, part in wrong:
        with subject.refused(code):
            subject.run(other, part)
    got = subject.run(subject.part(0, 20, 22, 0), other)
    subject.close(got, subject.alone[0, 20:22], subject.alone[1, 8:9])


def going_on_after_a_failure(subject: Subject) -> None:
    """The same call again gives the same logits, or is refused; a new sequence always works."""
    subject.engine.open_slots(3)
    for error in (RuntimeError(), KeyboardInterrupt()):
        for slot in range(3):
            subject.hold(slot, 20, slot)
        parts = [subject.part(i, 20, 23, i) for i in range(3)]
        with pytest.raises(type(error)), subject.break_run(error):
            subject.run(*parts)
        for i, part in enumerate(parts):
            try:
                got = subject.run(part)
            except LlmcError as refusal:
                assert refusal.code == "ROLLBACK_TOO_FAR" and subject.back(len(part.tokens)) < len(part.tokens)
                subject.hold(i, 20, i)
                got = subject.run(part)
            subject.close(got, subject.alone[i, 20:23])


def few_graph_runs(subject: Subject) -> None:
    """Sequences in adjacent slots share one run if each has one new token. A prompt takes at most one run."""
    subject.engine.open_slots(4)
    for slot in range(4):
        subject.hold(slot, 5, slot)
    before = subject.engine.runs
    subject.run(*(subject.part(i, 5, 6, i) for i in (2, 0, 3, 1)))
    assert subject.engine.runs - before <= (1 if subject.batches_steps else 4)
    before = subject.engine.runs
    subject.run(subject.part(0, 6, 30, 0), *(subject.part(i, 6, 7, i) for i in (1, 2, 3)))
    assert subject.engine.runs - before <= (4 if not subject.batches_steps else 1 if subject.mixes else 2)


def closing(subject: Subject) -> None:
    """The last clause: the engine can't be used afterwards."""
    subject.engine.close()
    subject.engine.close()
    for call in (
        lambda: subject.run(NewTokens([1])),
        lambda: subject.engine.open_slots(1),
        lambda: subject.engine.copy_slot(0, 0, 0),
    ):
        with subject.refused("ENGINE_CLOSED"):
            call()


def _two(subject: Subject, *ranges: tuple[int, int, int]) -> list[np.ndarray]:
    return [subject.alone[sequence, start:end] for sequence, start, end in ranges]


CLAUSES: tuple[Clause, ...] = (
    a_prompt_in_pieces,
    steps_of_sequences_in_any_slots,
    several_tokens_of_several_sequences,
    other_sequences_do_not_matter,
    only_wanted_logits,
    the_last_position,
    open_slots_keep_their_content,
    a_copy_continues_on_its_own,
    going_back,
    going_back_over_drafts,
    what_is_refused_changes_nothing,
    going_on_after_a_failure,
    few_graph_runs,
)
