"""What may be asked of a compilation, and what is refused before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc import LlmcError
from llmc.compiler.config import CompileConfig
from llmc.passes.fuse_attention import FuseAttention
from llmc.passes.insert_kv_cache import InsertKvCache
from llmc.passes.quantize import SCHEMES, Quantize


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"target": "abacus"}, "CONFIG_INVALID", "target is 'abacus'"),
        ({"ops": "exotic"}, "CONFIG_INVALID", "ops is 'exotic'"),
        ({"kv_cache": "none"}, "CONFIG_INVALID", "kv_cache is 'none'"),
        ({"quantize": "int3"}, "CONFIG_INVALID", "quantize is 'int3'"),
        ({"quantize": "int4", "group_size": 48}, "CONFIG_INVALID", "group_size is 48"),
        ({"quantize": "int8", "group_size": 64}, "CONFIG_INVALID", "group_size belongs to int4"),
        ({"group_size": 64}, "CONFIG_INVALID", "group_size belongs to int4"),
        ({"dtype": "bf16"}, "DTYPE_SLOW", "bf16"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, options: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(LlmcError) as caught:
        llmc.compile(tmp_path / "no such model", tmp_path / "out", **options)
    error = caught.value
    assert error.code == code and said.lower() in error.what.lower() and error.hint
    assert not list(tmp_path.iterdir())


def test_schemes() -> None:
    assert CompileConfig().scheme is None
    assert CompileConfig(quantize="int8").scheme == SCHEMES["int8"]
    chosen = CompileConfig(quantize="int4", group_size=128).scheme
    assert chosen is not None and (chosen.name, chosen.group_size) == ("int4", 128)


def test_which_passes() -> None:
    def kinds(**options: Any) -> list[type]:
        return [type(p) for p in CompileConfig(**options).engine_passes()]

    rounding = kinds(quantize="int8")
    assert Quantize not in kinds() and rounding.index(Quantize) < rounding.index(InsertKvCache)
    assert FuseAttention in kinds() and FuseAttention not in kinds(ops="standard")
    (cache,) = (p for p in CompileConfig(kv_cache="static").engine_passes() if isinstance(p, InsertKvCache))
    assert not cache.ring


@pytest.mark.parametrize(
    ("options", "precision", "prefill"),
    [
        ({}, "fp32", False),
        ({"quantize": "int4"}, "int4", True),
        ({"quantize": "int8"}, "int8", True),
        ({"quantize": "w8a8"}, "w8a8", False),
        ({"quantize": "int8", "ops": "standard"}, "int8", False),
    ],
)
def test_what_follows(options: dict[str, Any], precision: str, prefill: bool) -> None:
    config = CompileConfig(**options)
    assert (config.precision, config.rounds_prefill) == (precision, prefill)
