"""Tests of the checks of a build's record: each finds the fault that is planted into a good record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmc.compiler.targets.tensorrt.check_record import check_record
from llmc.runtimes.engines.tensorrt.record import (
    AttentionRecord,
    BuildRecord,
    CacheRecord,
    Fallback,
    GemmRecord,
    ProfileRecord,
)

GEMM = GemmRecord(["q", "k"], "int8", "int8", "int8", "int8", [64, 96], "gemm")
CACHES = CacheRecord(["present.0.key", "present.0.value"], {}, {})
PROFILE = ProfileRecord(10, 1000, [AttentionRecord("attention.0", "_mha")], [GEMM], [], CACHES, {})
GOOD = BuildRecord(
    "tensorrt_rtx", "1.7", ["8.9"], {"prefill": PROFILE, "decode": PROFILE}, [], 1000, 1100, 2000, None, 1.0, []
)


def planted(name: str, **changes: Any) -> BuildRecord:
    return replace(GOOD, profiles={**GOOD.profiles, name: replace(PROFILE, **changes)})


def gemm(**changes: Any) -> BuildRecord:
    return planted("prefill", gemms=[GEMM, replace(GEMM, **changes)])


PLANTS = {
    "attention": planted("decode", attentions=[AttentionRecord("attention.0", None)]),
    "cache copied": planted("decode", caches=CacheRecord(["present.0.key"], {"present.0.value": "move"}, {})),
    "cache not in place": planted("prefill", caches=CacheRecord(["present.0.key"], {}, {})),
    "cache read in full": planted("decode", caches=replace(CACHES, read_in_full={"present.0.key": "move"})),
    "weight dtype": gemm(weight="fp16"),
    "input dtype": gemm(input="fp16"),
    "weight expanded": planted("prefill", expanded={"dequantize": ["q"]}),
    "gemm unknown": planted("prefill", unknown_gemms=["head"]),
    "weight ratio": replace(GOOD, weight_bytes=1301),
}


def test_a_good_record_has_no_problems() -> None:
    assert check_record(GOOD, caches=2) == []


@pytest.mark.parametrize("check", PLANTS)
def test_a_planted_fault_fails_its_check(check: str) -> None:
    (problem,) = check_record(PLANTS[check], caches=2)
    assert problem.check == check
    assert problem.what.endswith(".")


def test_reported_fallbacks_are_no_problems() -> None:
    record = replace(PLANTS["attention"], fallbacks=[Fallback("attention.0", "decode", "too wide")])
    assert check_record(record, caches=2) == []
    other = replace(PLANTS["attention"], fallbacks=[Fallback("attention.0", "prefill", "too wide")])
    assert [one.check for one in check_record(other, caches=2)] == ["attention"]


def test_prefill_may_read_caches_in_full() -> None:
    assert (
        check_record(planted("prefill", caches=replace(CACHES, read_in_full={"present.0.key": "move"})), caches=2) == []
    )


def test_inputs_that_are_not_quantized_in_the_graph_may_have_any_dtype() -> None:
    assert check_record(gemm(requested_input="bf16", input="fp32"), caches=2) == []
