"""What may be asked of a compilation, and what is refused before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmc
from llmc import LlmcError
from llmc.compiler.compress.sparsity import Sparsity
from llmc.compiler.config import CompileConfig
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.quantize.move_scales import MoveScales
from llmc.passes.quantize.rounding_plan import SCHEMES_BY_NAME, Grid


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"target": "abacus"}, "CONFIG_INVALID", "target is 'abacus'"),
        ({"ops": "exotic"}, "CONFIG_INVALID", "ops is 'exotic'"),
        ({"kv_cache": "none"}, "CONFIG_INVALID", "kv_cache is 'none'"),
        ({"kv_cache_dtype": "int4"}, "CONFIG_INVALID", "kv_cache_dtype is 'int4'"),
        ({"quantize": "int3"}, "CONFIG_INVALID", "quantize is 'int3'"),
        ({"quantize": "int4", "group_size": 48}, "CONFIG_INVALID", "group_size is 48"),
        ({"quantize": "w8a8", "group_size": 64}, "CONFIG_INVALID", "group_size belongs to int8, int4 and nf4"),
        ({"quantize": "int4", "group_size": "channel"}, "SCHEME_INVALID", "int4 has groups of 'channel'"),
        ({"group_size": 64}, "CONFIG_INVALID", "group_size belongs to"),
        ({"algo": "gptq"}, "CONFIG_INVALID", "nothing is quantized"),
        ({"quantize": "w8a8", "algo": "awq"}, "CONFIG_INVALID", "algo is 'awq'"),
        ({"quantize": "int8", "raise_share": 0.5}, "CONFIG_INVALID", "raise_share is 0.5"),
        ({"quantize": "int4", "raise_share": 2.0}, "CONFIG_INVALID", "raise_share is 2.0"),
        ({"quantize": "int8", "max_kl": 0.1}, "CONFIG_INVALID", "max_kl is 0.1"),
        ({"quantize": "int4", "algo": "rtn", "max_kl": 0.1}, "CONFIG_INVALID", "max_kl is 0.1"),
        ({"quantize": "int4", "max_kl": 0.1, "raise_share": 0.1}, "CONFIG_INVALID", "both say"),
        ({"quantize": "int8", "round_prompts": False}, "CONFIG_INVALID", "round_prompts is False"),
        ({"quantize": "int4", "ops": "standard", "round_prompts": False}, "CONFIG_INVALID", "round_prompts is False"),
        ({"prune": "1:4"}, "CONFIG_INVALID", "prune is '1:4'"),
        ({"prune": 1.0}, "CONFIG_INVALID", "prune is 1.0"),
        ({"prune": "2:4", "prune_algo": "magnitude"}, "CONFIG_INVALID", "prune_algo is 'magnitude'"),
        ({"prune_algo": "wanda"}, "CONFIG_INVALID", "prune_algo is about pruned weights"),
        ({"drop_layers": -1}, "CONFIG_INVALID", "drop_layers is -1"),
        ({"drop_layers": 1, "calib": "no such file"}, "TEXT_NOT_FOUND", "no such file"),
        ({"prune": 0.5, "calib": "no such file"}, "TEXT_NOT_FOUND", "no such file"),
        ({"quantize": "int4", "calib_samples": 0}, "CONFIG_INVALID", "0 sequences"),
        ({"quantize": "int4", "calib": "no such file"}, "TEXT_NOT_FOUND", "no such file"),
        ({"dtype": "bf16"}, "DTYPE_SLOW", "bf16"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, options: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(LlmcError) as caught:
        llmc.compile(tmp_path / "no such model", tmp_path / "out", **options)
    error = caught.value
    assert error.code == code and said.lower() in error.what.lower() and error.hint
    assert not list(tmp_path.iterdir())


def test_an_empty_calibration_file(tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_text(" \n")
    with pytest.raises(LlmcError, match="TEXT_EMPTY"):
        llmc.compile(tmp_path / "no such model", tmp_path / "out", quantize="int4", calib=text)


def test_schemes() -> None:
    assert CompileConfig().scheme is None
    assert CompileConfig(quantize="int8").scheme == SCHEMES_BY_NAME["int8"]
    chosen = CompileConfig(quantize="int4", group_size=32).scheme
    assert chosen is not None and (chosen.name, chosen.linears) == ("int4", Grid("int4", 32))
    chosen = CompileConfig(quantize="int8", group_size="channel").scheme
    assert chosen is not None and chosen.linears == Grid("int8") and chosen.wide == SCHEMES_BY_NAME["int8"].wide


def test_algorithms() -> None:
    defaults = {name: CompileConfig(quantize=name).algorithm for name in SCHEMES_BY_NAME}
    assert defaults == {"int8": "smoothquant", "int4": "gptq", "w8a8": "smoothquant", "fp8": "gptq", "nf4": "rtn"}
    assert CompileConfig(quantize="int4", algo="awq").algorithm == "awq"
    assert not CompileConfig(quantize="int4", algo="rtn").raises and CompileConfig(quantize="int4").raises
    assert not CompileConfig(quantize="int4", raise_share=0.0).raises


def test_pruning() -> None:
    assert CompileConfig().sparsity is None and not CompileConfig().reads_text
    chosen = CompileConfig(prune="2:4")
    assert chosen.sparsity == Sparsity(0.5, 4) and chosen.prune_algorithm == "sparsegpt"
    assert chosen.reads_text and not chosen.calibrates
    assert CompileConfig(prune=0.3, prune_algo="wanda").prune_algorithm == "wanda"
    rounded = CompileConfig(drop_layers=1, quantize="int4", algo="rtn")
    assert rounded.reads_text and not rounded.calibrates, "the text is not for rounding"


def test_which_passes() -> None:
    def kinds(**options: Any) -> list[type]:
        return [type(p) for p in CompileConfig(**options).engine_passes([MoveScales({})])]

    assert kinds().index(MoveScales) < kinds().index(InsertKvCache)
    assert FuseAttention in kinds() and FuseAttention not in kinds(ops="standard")
    (cache,) = (p for p in CompileConfig(kv_cache="static").engine_passes() if isinstance(p, InsertKvCache))
    assert not cache.ring and cache.codes is None
    (cache,) = (p for p in CompileConfig(kv_cache_dtype="fp8").engine_passes() if isinstance(p, InsertKvCache))
    assert cache.ring and cache.codes == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("options", "prefill"),
    [
        ({}, False),
        ({"quantize": "int4"}, True),
        ({"quantize": "int8"}, False),
        ({"quantize": "w8a8"}, False),
        ({"quantize": "int4", "ops": "standard"}, False),
        ({"quantize": "int4", "round_prompts": False}, False),
    ],
)
def test_what_follows(options: dict[str, Any], prefill: bool) -> None:
    assert CompileConfig(**options).rounds_prefill == prefill
