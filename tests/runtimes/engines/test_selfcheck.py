"""The numeric half of the gate: it passes what is right and sees every way of being wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import artifact

import llmc
from llmc import LlmcError
from llmc.runtimes.engines.base import Engine
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.selfcheck import CACHE_LIMITS, LIMITS, Check, GateReference, check, limits_key

Change = Callable[[Batch], Batch]


class Wrong:
    """An engine whose calls and answers are changed on the way."""

    def __init__(self, engine: Engine, call: Change, answer: Callable[[np.ndarray], np.ndarray]) -> None:
        self.engine, self.call, self.answer = engine, call, answer
        self.spec = engine.spec
        self.slots = self.runs = 0

    def open_slots(self, count: int) -> None:
        self.slots = count
        self.engine.open_slots(count)

    def forward(self, batch: Batch) -> HostLogits:
        return HostLogits(self.answer(self.engine.forward(self.call(batch)).numpy()))

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self.engine.copy_slot(source, target, length)

    def close(self) -> None:
        self.engine.close()


def is_step(batch: Batch) -> bool:
    return bool((batch.lengths == 1).all())


def later(batch: Batch) -> Batch:
    return replace(batch, starts=batch.starts + 1)


def forgets_the_last(batch: Batch) -> Batch:
    return replace(batch, starts=np.maximum(batch.starts - 1, 0)) if is_step(batch) else batch


def mixes_up_sequences_of_a_step(batch: Batch) -> Batch:
    return replace(batch, slots=batch.slots[::-1]) if is_step(batch) else batch


def forgets_what_came_before_a_piece(batch: Batch) -> Batch:
    return batch if is_step(batch) else replace(batch, starts=batch.starts * 0)


def forgets_the_last_beside_a_piece(batch: Batch) -> Batch:
    starts = np.maximum(batch.starts - (batch.lengths == 1), 0)
    return batch if is_step(batch) else replace(batch, starts=starts)


def same(*values: Any) -> Any:
    return values if len(values) > 1 else values[0]


def with_nan(logits: np.ndarray) -> np.ndarray:
    logits = logits.copy()
    logits[..., 5] = np.nan
    return logits


# What is wrong on the way in, on the way out, and the checks that must fail for it.
FAULTS = {
    "right": (same, same, ()),
    "a number more on all logits": (same, lambda logits: logits + 3, ()),
    "positions shifted": (later, same, (0, 1, 2, 3)),
    "a token forgotten": (forgets_the_last, same, (1,)),
    "sequences mixed up": (mixes_up_sequences_of_a_step, same, (1,)),
    "a piece begins anew": (forgets_what_came_before_a_piece, same, (2, 3)),
    "a token forgotten beside a piece": (forgets_the_last_beside_a_piece, same, (3,)),
    "vocabulary permuted": (same, lambda logits: np.roll(logits, 1, -1), (0, 1, 2, 3)),
    "logits scaled": (same, lambda logits: logits * 1.01, (0, 1, 2, 3)),
    "not a number": (same, with_nan, (0, 1, 2, 3)),
    "infinite": (same, lambda logits: logits / 0 if len(logits) <= 3 else logits, (1, 2, 3)),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return llmc.load(artifact("speaking"), threads=1)


@pytest.fixture(scope="module")
def reference() -> GateReference:
    return GateReference.read(artifact("speaking"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen_where_they_are(engine: Engine, reference: GateReference, name: str) -> None:
    call, answer, failing = FAULTS[name]
    report = check(Wrong(engine, call, answer), reference)
    assert [c.name for c in report.checks] == [
        "prompts", "a ragged batch, token by token", "a prompt in pieces", "pieces beside other sequences",
    ]  # fmt: skip
    assert [i for i, c in enumerate(report.checks) if not c.ok] == list(failing)
    assert report.passed == (not failing) == report.as_dict()["passed"]


def test_what_is_measured(engine: Engine, reference: GateReference) -> None:
    report = check(engine, reference)
    # Prompts of 7, 26 and 70 tokens, 12 single tokens after each, and the last token of each of three pieces; then 12
    # pieces, each beside a token of each other sequence.
    assert (report.precision, report.tokens) == ("fp32", 103 + 36 + 3 + 36)
    assert all(0 < c.measured < 1e-5 for c in report.checks)
    # An error of a hundredth is measured as one.
    scaled = check(Wrong(engine, same, lambda logits: logits * 1.01), reference)
    assert [c.measured for c in scaled.checks] == [pytest.approx(0.01, rel=0.01)] * 4


def test_quantized_weights_are_checked_against_both() -> None:
    folder = artifact("speaking", quantize="int4")
    reference = GateReference.read(folder)
    engine = llmc.load(folder, threads=1)
    report = check(engine, reference)
    assert report.passed and len(report.checks) == 8
    model, alike = report.checks[0], report.checks[1]
    assert (model.limit, alike.limit) == (LIMITS["int4"].model, LIMITS["int4"].rounded)
    assert alike.measured < model.measured / 3
    # An error against the same weights counts, whatever the one against the model is.
    other = replace(reference, rounded=reference.rounded * np.float32(0.6))
    assert [c.ok for c in check(engine, other).checks] == [True, False] * 4


@pytest.mark.parametrize("codes", CACHE_LIMITS)
def test_a_quantized_cache_is_checked_against_quantized_keys_and_values(codes: str) -> None:
    folder = artifact("speaking", kv_cache_dtype=codes)
    reference, engine = GateReference.read(folder), llmc.load(folder, threads=1)
    report = check(engine, reference)
    assert report.passed and report.precision == f"fp32, {codes} cache" and len(report.checks) == 8
    model, alike = report.checks[0], report.checks[1]
    assert (model.limit, alike.limit) == (CACHE_LIMITS[codes].model, CACHE_LIMITS[codes].rounded)
    assert alike.measured < model.measured / 5
    for call in (later, forgets_the_last, mixes_up_sequences_of_a_step, forgets_what_came_before_a_piece):
        assert not check(Wrong(engine, call, same), reference).passed


def test_limits_of_quantized_caches_are_the_wider_of_both() -> None:
    assert LIMITS[limits_key("fp32", False, "int8")] == CACHE_LIMITS["int8"]
    assert LIMITS[limits_key("int4", False, "fp8")] == LIMITS["int4"]
    assert LIMITS[limits_key("fp32", True, "fp8")] == replace(CACHE_LIMITS["fp8"], model=2.0)
    assert limits_key("int4", False) == "int4" and limits_key("int4", True) == "pruned int4"


def test_a_reference_as_it_was_saved(reference: GateReference, tmp_path: Path) -> None:
    reference.save(tmp_path)
    again = GateReference.read(tmp_path)
    for field in fields(GateReference):
        assert np.array_equal(getattr(again, field.name), getattr(reference, field.name)), field.name
    with pytest.raises(LlmcError) as caught:
        GateReference.read(tmp_path / "none")
    assert caught.value.code == "REFERENCE_MISSING"


def test_nan_is_never_within_a_limit() -> None:
    assert Check("x", 1.0, 1.0).ok and not Check("x", 1.1, 1.0).ok and not Check("x", float("nan"), 1.0).ok
