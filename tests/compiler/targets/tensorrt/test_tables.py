"""Tests of the tables and remarks about engines, which are made from the records of their builds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from neutral import PLAN, write_neutral

from llmc.compiler.targets.base import Table
from llmc.compiler.targets.tensorrt.tables import engine_remarks, engine_tables
from llmc.runtimes.artifact.manifest import Manifest
from llmc.runtimes.engines.tensorrt.record import (
    AttentionRecord,
    BuildRecord,
    CacheRecord,
    Fallback,
    GemmRecord,
    Problem,
    ProfileRecord,
    write_record,
)

GEMM = GemmRecord(["q", "k"], "int4", "fp16", "int4", "fp16", [64, 96], "gemm_kernel")
PROFILE = ProfileRecord(
    23, 9_000_000, [AttentionRecord("attention.0", "_mha"), AttentionRecord("attention.1", None)], [GEMM, GEMM], [],
    CacheRecord(["present.0.key", "present.0.value"], {}, {}), {},
)  # fmt: skip
RECORD = BuildRecord(
    "tensorrt", "10.15.1.29", ["8.9", "12.0"], {"prefill": PROFILE, "decode": PROFILE}, [], 50_000_000, 60_000_000,
    80_000_000, 700_000_000, 12.3, ["A warning of the library."],
)  # fmt: skip
FALLBACK = Fallback("attention.1", "decode", "its heads are too wide")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def written(folder: Path, **changes: Any) -> Manifest:
    manifest = write_neutral(folder, plans=[PLAN])
    write_record(replace(RECORD, **changes), folder / PLAN.record)
    return manifest


def by_title(tables: list[Table]) -> dict[str, Table]:
    return {table.title: table for table in tables}


def test_tables_of_an_engine(folder: Path) -> None:
    tables = by_title(engine_tables(folder, written(folder)))
    assert list(tables) == ["Engine engine.plan", "Profiles", "Matrix multiplications"]
    facts = dict(map(tuple, tables["Engine engine.plan"].rows))  # type: ignore[arg-type]
    assert facts == {
        "compute capabilities": "8.9, 12.0",
        "built by": "tensorrt 10.15.1.29 in 12 s, with 700 MB of memory at its peak",
        "plan": "80 MB",
        "weights": "60 MB, 1.20 times those of the graph",
        "warning": "A warning of the library.",
    }
    prefill, decode = tables["Profiles"].rows
    assert list(prefill) == ["prefill", "1", "1 to 32", 23, "1 of 2", "2 of 2", "9 MB"]
    assert list(decode)[:3] == ["decode", "1 to 4", "1"]
    gemms = tables["Matrix multiplications"].rows
    assert [list(row) for row in gemms] == [
        [name, 2, "int4", "int4", "fp16", "fp16", "64 x 96", "gemm_kernel"] for name in ("prefill", "decode")
    ]


def test_an_artifact_without_engine_says_how_to_build_one(folder: Path) -> None:
    manifest = write_neutral(folder, plans=[])
    (table,) = engine_tables(folder, manifest)
    assert table.rows == [["engine", f"none; build one: llmc finalize {folder}"]]
    assert engine_remarks(folder, manifest) == []


def test_fallbacks_and_failed_checks_are_shown(folder: Path) -> None:
    copying = replace(
        PROFILE, expanded={"dequantize": ["q"]}, caches=CacheRecord(["present.0.key"], {"present.0.value": "move"}, {})
    )
    problems = [Problem("weight expanded", "In decode, one."), Problem("weight expanded", "In decode, other.")]
    manifest = written(
        folder, fallbacks=[FALLBACK], problems=problems, profiles={"prefill": PROFILE, "decode": copying}
    )
    tables = by_title(engine_tables(folder, manifest))
    assert [list(row) for row in tables["Checks that failed"].rows] == [[one.check, one.what] for one in problems]
    assert [list(row) for row in tables["Fallbacks"].rows] == [
        ["decode", "attention.1", "its heads are too wide"],
        ["decode", "dequantize", "writes out the weights of q"],
        ["decode", "present.0.value", "is copied by move"],
    ]
    assert tables["Profiles"].rows[1][5] == "1 of 2"
    assert engine_remarks(folder, manifest) == [
        "The engine fails the check 'weight expanded': In decode, one. (1 more like it)",
        "Attentions that no single kernel computes: 1. `llmc inspect` says why.",
    ]


def test_a_good_engine_needs_no_remark(folder: Path) -> None:
    assert engine_remarks(folder, written(folder)) == []
