"""Every engine keeps the contract, with every kind of artifact; and each clause of it sees a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import engine_contract as contract
import numpy as np
import pytest
from compiled import artifact
from engine_contract import CLAUSES, LENGTH, Clause, Subject
from fake_engines import ToyEngine, hashed

import llmc
from llmc.errors import LlmcError
from llmc.runtimes.engines.base import Engine
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.ort.graph import GraphSession

# Another order of sums; keys that it moves across the middle between two codes, or inputs of a kernel; inputs that one
# graph quantizes by token and the other by group. Another sequence or position is off by more than 1.
EXACT, CODES, INPUTS = 1e-5, 0.03, 0.25
# Model, options, tolerance. All kernels, caches of all kinds; most layers of gemma3_text keep a window of 6.
ARTIFACTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "contrib": ("speaking", {}, EXACT),
    "standard": ("gemma3_text", {"ops": "standard", "kv_cache": "static"}, EXACT),
    "rings": ("gemma3_text", {}, EXACT),
    "int8": ("speaking", {"quantize": "int8"}, CODES),
    "int4": ("speaking", {"quantize": "int4"}, INPUTS),
    "w8a8": ("speaking", {"quantize": "w8a8"}, INPUTS),
    "nf4": ("speaking", {"quantize": "nf4"}, CODES),
    "int8 cache": ("speaking", {"kv_cache_dtype": "int8"}, CODES),
    "fp8 rings": ("gemma3_text", {"kv_cache_dtype": "fp8"}, CODES),
}
MIXING = ("int4", "w8a8")  # their second graph is small enough for that


def tokens(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocab_size, (4, LENGTH))


def toy(kind: type[ToyEngine] = ToyEngine, rollback: int | None = None) -> Subject:
    engine = kind(hashed(), rollback=rollback)

    @contextmanager
    def break_run(error: BaseException) -> Iterator[None]:
        rule, calls = engine.rule, iter([False, True])

        def breaks(history: Any) -> np.ndarray:
            if next(calls, True):
                raise error
            return rule(history)

        engine.rule = breaks
        try:
            yield
        finally:
            engine.rule = rule

    return Subject(engine, tokens(32), EXACT, break_run)


def of_artifact(kind: str) -> Subject:
    model, options, tolerance = ARTIFACTS[kind]
    engine = llmc.load(artifact(model, **options), threads=1)
    return Subject(engine, tokens(72), tolerance, break_graph, mixes=kind in MIXING)


@contextmanager
def break_graph(error: BaseException) -> Iterator[None]:
    """Let the second run of a graph be its last: it has written into the caches."""
    calls, run = iter([False, True]), GraphSession.run

    def breaks(self: GraphSession, *arguments: Any) -> np.ndarray:
        logits = run(self, *arguments)
        if next(calls, True):
            raise error
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphSession, "run", breaks)
        yield


@pytest.fixture(scope="module", params=["toy", "toy with rings", *ARTIFACTS])
def subject(request: pytest.FixtureRequest) -> Subject:
    toys: dict[str, Callable[[], Subject]] = {"toy": toy, "toy with rings": lambda: toy(rollback=1)}
    return toys[request.param]() if request.param in toys else of_artifact(request.param)


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_contract(subject: Subject, clause: Clause) -> None:
    clause(subject)


def test_closing() -> None:
    contract.closing(toy())
    contract.closing(of_artifact("contrib"))


# Each clause sees a fault ---------------------------------------------------------------------------------------------


class ForgetsPieces(ToyEngine):
    def forward(self, batch: Batch) -> HostLogits:
        return super().forward(batch if batch.starts.max() < 20 else replace(batch, starts=batch.starts * 0))


class MixesUpSlots(ToyEngine):
    """A step in slots that are not in order."""

    def forward(self, batch: Batch) -> HostLogits:
        return super().forward(replace(batch, slots=np.sort(batch.slots)))


class CutsLongSequences(ToyEngine):
    """All sequences get as many tokens as the first."""

    def forward(self, batch: Batch) -> HostLogits:
        whole = super().forward(batch)
        uneven = len(batch.lengths) > 1 and batch.lengths.max() > 1
        return HostLogits(np.roll(whole.numpy(), 1, 0)) if uneven else whole


class Leaks(ToyEngine):
    def forward(self, batch: Batch) -> HostLogits:
        return HostLogits(super().forward(batch).numpy() + np.float32(1e-6 * batch.tokens[0]))


class ReturnsTooMuch(ToyEngine):
    def forward(self, batch: Batch) -> HostLogits:
        return super().forward(batch if len(batch.wanted) else replace(batch, wanted=np.arange(1)))


class ClosesEarly(ToyEngine):
    def forward(self, batch: Batch) -> HostLogits:
        room = replace(self.spec, max_seq_len=self.spec.max_seq_len - 1)
        batch.check(room, self.slots)
        return super().forward(batch)


class LosesSlots(ToyEngine):
    def open_slots(self, count: int) -> None:
        self.slots, self._slots = 0, []
        super().open_slots(count)


class SharesCopies(ToyEngine):
    def copy_slot(self, source: int, target: int, length: int) -> None:
        super().copy_slot(source, target, length)
        self._slots[target] = self._slots[source]


class GoesBackTooFar(ToyEngine):
    """As a ring does whose oldest positions are overwritten."""

    def forward(self, batch: Batch) -> HostLogits:
        rollback, self.spec = self.spec, replace(self.spec, rollback=None)
        try:
            return super().forward(batch)
        finally:
            self.spec = rollback


class ChecksTooLate(ToyEngine):
    def forward(self, batch: Batch) -> HostLogits:
        try:
            return super().forward(batch)
        except LlmcError:
            self._slots[0] = [1]
            raise


class KeepsHalf(ToyEngine):
    """A failure leaves new tokens behind, after which positions are counted."""

    def forward(self, batch: Batch) -> HostLogits:
        try:
            return super().forward(batch)
        except (RuntimeError, KeyboardInterrupt):
            self._slots = [slot[:-3] for slot in self._slots]
            raise


class RunsTwice(ToyEngine):
    def forward(self, batch: Batch) -> HostLogits:
        self.runs += len(batch.lengths) - 1
        return super().forward(batch)


class NeverCloses(ToyEngine):
    def close(self) -> None:
        pass


FAULTS: list[tuple[type[ToyEngine], Clause]] = [
    (ForgetsPieces, contract.a_prompt_in_pieces),
    (MixesUpSlots, contract.steps_of_sequences_in_any_slots),
    (CutsLongSequences, contract.several_tokens_of_several_sequences),
    (Leaks, contract.other_sequences_do_not_matter),
    (ReturnsTooMuch, contract.only_wanted_logits),
    (ClosesEarly, contract.the_last_position),
    (LosesSlots, contract.open_slots_keep_their_content),
    (SharesCopies, contract.a_copy_continues_on_its_own),
    (GoesBackTooFar, contract.going_back),
    (ChecksTooLate, contract.what_is_refused_changes_nothing),
    (KeepsHalf, contract.going_on_after_a_failure),
    (RunsTwice, contract.few_graph_runs),
    (NeverCloses, contract.closing),
]


@pytest.mark.parametrize(("fault", "clause"), FAULTS, ids=lambda value: value.__name__)
def test_each_clause_sees_a_fault(fault: type[ToyEngine], clause: Clause) -> None:
    rollback = 1 if fault is GoesBackTooFar else None
    with pytest.raises((AssertionError, LlmcError, pytest.fail.Exception)):
        clause(toy(fault, rollback))


def test_there_is_a_fault_for_each_clause() -> None:
    assert [clause for _, clause in FAULTS] == [*CLAUSES, contract.closing]


def test_an_engine_is_one(subject: Subject) -> None:
    engine: Engine = subject.engine
    assert engine.spec.vocab_size > 0 and engine.slots > 0 and engine.runs > 0
