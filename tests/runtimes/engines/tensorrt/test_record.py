"""Tests of the record of a build as a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.errors import LlmcError
from llmc.runtimes.engines.tensorrt.record import (
    AttentionRecord,
    BuildRecord,
    CacheRecord,
    Fallback,
    GemmRecord,
    ProfileRecord,
    read_record,
    write_record,
)

PROFILE = ProfileRecord(
    10,
    1000,
    [AttentionRecord("attention.0", "_mha"), AttentionRecord("attention.1", None)],
    [GemmRecord(["q", "k"], "int4", "bf16", "int4", "bf16", [64, 96], "gemm")],
    ["head"],
    CacheRecord(["present.0.key"], {"present.0.value": "move"}, {}),
    {"dequantize": ["v"]},
)
RECORD = BuildRecord(
    "tensorrt_rtx",
    "1.7.1.116",
    ["8.9"],
    {"prefill": PROFILE},
    [Fallback("attention.1", "prefill", "too wide")],
    1000,
    1100,
    2000,
    None,
    1.5,
    ["Slow."],
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path / "engine.json")
    assert read_record(tmp_path / "engine.json") == RECORD
    assert RECORD.weight_ratio == 1.1


@pytest.mark.parametrize("fault", ["missing", "no JSON", "another type", "an unknown key", "another library"])
def test_a_damaged_record_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "engine.json"
    write_record(RECORD, path)
    document = json.loads(path.read_text())
    if fault == "missing":
        path.unlink()
    elif fault == "no JSON":
        path.write_text("{")
    else:
        changes = {
            "another type": {"plan_bytes": "2000"},
            "an unknown key": {"colour": 1},
            "another library": {"library": "other"},
        }
        path.write_text(json.dumps(document | changes[fault]))
    with pytest.raises(LlmcError) as caught:
        read_record(path)
    assert caught.value.code == "ARTIFACT_INVALID"
