"""Every engine keeps the contract, with every kind of artifact; and each clause of it sees a fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_contract as contract
import numpy as np
import pytest
from compiled import artifact
from engine_contract import CLAUSES, LENGTH, Clause, Subject, broken_runs
from fake_engines import ToyEngine, hashed
from fake_tensorrt import FakeTensorRt
from mock_cuda import MockDriver
from neutral import VOCAB, copy_with_plan, write_neutral
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.targets.onnx.lower import Lowering
from llmc.compiler.targets.onnx.standard import STANDARD, cached_attention
from llmc.compiler.targets.ort.write import TABLES
from llmc.errors import LlmcError
from llmc.runtimes.artifact.open import read_manifest
from llmc.runtimes.engines.base import Engine
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.ort.engine import OrtEngine
from llmc.runtimes.engines.ort.graph import GraphSession
from llmc.runtimes.engines.tensorrt.engine import TensorRtEngine
from llmc.runtimes.engines.tensorrt.profile import ProfileRunner
from llmc.runtimes.engines.tensorrt.section import Library, Plan, Profile

# Another order of sums; the same in fp16; keys that it moves across the middle between two codes, or a kernel's inputs,
# and inputs that one graph quantizes by token and the other by group. Another sequence or position is off by over 1.
EXACT, HALF, CODES, INPUTS = 1e-5, 5e-3, 0.03, 0.25
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
    "int8 cache, standard": ("speaking", {"kv_cache_dtype": "int8", "ops": "standard"}, CODES),
    "int4 and int8 cache": ("speaking", {"quantize": "int4", "kv_cache_dtype": "int8"}, INPUTS),
    "fp8 rings": ("gemma3_text", {"kv_cache_dtype": "fp8"}, CODES),
    "rings with slack": ("gemma3_text", {"spec_tokens": 3}, EXACT),
    "int8 rings with slack": ("gemma3_text", {"kv_cache_dtype": "int8", "spec_tokens": 3}, CODES),
}
MIXING = ("int4", "w8a8", "int4 and int8 cache")  # their second graph is small enough for that


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


def break_graph(error: BaseException) -> AbstractContextManager[None]:
    return broken_runs(GraphSession, error)


# The library, the profiles, and the positions of a slot. With 61, slots have gaps between them.
PLANS: dict[str, tuple[Library, Profile, Profile, int]] = {
    "tensorrt": ("tensorrt", Profile(1, 32), Profile(4, 1), 64),
    "tensorrt, small profiles": ("tensorrt", Profile(1, 16), Profile(2, 1), 64),
    "tensorrt, slots with gaps": ("tensorrt", Profile(1, 32), Profile(4, 1), 61),
    "tensorrt for rtx": ("tensorrt_rtx", Profile(1, 40), Profile(8, 1), 64),
}


def of_plan(kind: str, folder: Path) -> Subject:
    """A plan that ONNX Runtime computes, over a driver whose device memory is host memory."""
    library, prefill, decode, length = PLANS[kind]
    driver = MockDriver()
    fake = FakeTensorRt(driver, library)
    plan = Plan("engine.plan", library, fake.version, ["8.0", driver.device.sm], "engine.json")
    profiles = {"prefill": prefill, "decode": decode}
    manifest = write_neutral(folder / "out", length=length, plans=[plan], profiles=profiles)
    engine = TensorRtEngine(folder / "out", manifest, driver=driver, find=fake.find)
    batches = decode.batch >= 4 and length % 8 == 0
    return Subject(engine, tokens(VOCAB), HALF, break_plan, batches_steps=batches)


# Compiled for target "trt".
NEUTRAL: dict[str, tuple[str, dict[str, Any], float]] = {
    "tensorrt, compiled": ("speaking", {}, HALF),
}


def of_compiled_plan(kind: str, folder: Path) -> Subject:
    model, options, tolerance = NEUTRAL[kind]
    driver = MockDriver()
    fake = FakeTensorRt(driver)
    manifest = copy_with_plan(artifact(model, target="trt", engine=False, **options), folder / "out")
    engine = TensorRtEngine(folder / "out", manifest, driver=driver, find=fake.find)
    return Subject(engine, tokens(72), tolerance, break_plan)


def break_plan(error: BaseException) -> AbstractContextManager[None]:
    return broken_runs(ProfileRunner, error)


TOYS = {"toy": None, "toy with rings": 1, "toy with slack": 4}


@pytest.fixture(scope="module", params=[*TOYS, *ARTIFACTS, *PLANS, *NEUTRAL])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    kind = request.param
    if kind in PLANS:
        return of_plan(kind, tmp_path_factory.mktemp("plan"))
    if kind in NEUTRAL:
        return of_compiled_plan(kind, tmp_path_factory.mktemp("plan"))
    return toy(rollback=TOYS[kind]) if kind in TOYS else of_artifact(kind)


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_contract(subject: Subject, clause: Clause) -> None:
    clause(subject)


def test_closing(tmp_path: Path) -> None:
    contract.closing(toy())
    contract.closing(of_artifact("contrib"))
    contract.closing(of_plan("tensorrt", tmp_path))


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


class CountsFromTheEnd(ToyEngine):
    """It goes back from where a sequence ends now, although the ring has lost more."""

    def forward(self, batch: Batch) -> HostLogits:
        self._reached = [len(slot) for slot in self._slots]
        return super().forward(batch)


class KeepsTooFew(ToyEngine):
    """A ring that lacks a position if it goes back as far as it may."""

    def forward(self, batch: Batch) -> HostLogits:
        for slot, start in zip(batch.slots, batch.starts, strict=True):
            if start and self._reached[slot] - start == self.spec.rollback:
                self._slots[slot][0] ^= 1
        return super().forward(batch)


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
    (CountsFromTheEnd, contract.going_back),
    (KeepsTooFew, contract.going_back_over_drafts),
    (ChecksTooLate, contract.what_is_refused_changes_nothing),
    (KeepsHalf, contract.going_on_after_a_failure),
    (RunsTwice, contract.few_graph_runs),
    (NeverCloses, contract.closing),
]


@pytest.mark.parametrize(("fault", "clause"), FAULTS, ids=lambda value: value.__name__)
def test_each_clause_sees_a_fault(fault: type[ToyEngine], clause: Clause) -> None:
    rollback = {GoesBackTooFar: 1, CountsFromTheEnd: 4, KeepsTooFew: 4}.get(fault)
    with pytest.raises((AssertionError, LlmcError, pytest.fail.Exception)):
        clause(toy(fault, rollback))


def test_there_is_a_fault_for_each_clause() -> None:
    assert list(dict.fromkeys(clause for _, clause in FAULTS)) == [*CLAUSES, contract.closing]


@pytest.mark.parametrize("clause", [contract.going_back, contract.going_back_over_drafts])
@pytest.mark.parametrize("kind", ["rings with slack", "int8 rings with slack"])
def test_stale_positions_of_a_ring_are_seen(kind: str, clause: Clause) -> None:
    """The rings are one position shorter than the manifest says."""
    model, options, tolerance = ARTIFACTS[kind]
    folder = artifact(model, **options)
    manifest = read_manifest(folder)
    assert manifest.rollback == 4
    caches = [replace(cache, slack=cache.slack + (cache.kind == "ring")) for cache in manifest.caches]
    engine = OrtEngine(folder, replace(manifest, caches=caches), threads=1)
    with pytest.raises(AssertionError, match="logits are off by"):
        clause(Subject(engine, tokens(72), tolerance, break_graph))


def test_a_mask_that_forgets_the_window_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(g: Lowering, window: int | None, **others: Any) -> Any:
        return cached_attention(g, window=None, **others)

    monkeypatch.setitem(TABLES, "standard", STANDARD | {"llmc.cached_attention": forgets})
    options = {"ops": "standard", "spec_tokens": 3}
    llmc.compile(tiny_model("gemma3_text"), tmp_path / "out", verify=False, **options)
    subject = Subject(llmc.load(tmp_path / "out", threads=1), tokens(72), EXACT, break_graph)
    with pytest.raises(AssertionError, match="logits are off by"):
        contract.a_prompt_in_pieces(subject)


def test_an_engine_is_one(subject: Subject) -> None:
    engine: Engine = subject.engine
    assert engine.spec.vocab_size > 0 and engine.slots > 0 and engine.runs > 0
