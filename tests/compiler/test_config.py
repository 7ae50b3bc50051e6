"""Options of a compilation: what is refused before any work, and what follows from what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc import LlmcError
from llmc.compiler.config import ALGORITHMS, CompileConfig, parse_sparsity
from llmc.errors import UsageError


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"target": "abacus"}, "CONFIG_INVALID", "target is 'abacus'"),
        ({"ops": "exotic"}, "CONFIG_INVALID", "ops is 'exotic'"),
        ({"quantise": "int8"}, "OPTION_UNKNOWN", "quantise is no option"),
        ({"kv_cache": "none"}, "CONFIG_INVALID", "kv_cache is 'none'"),
        ({"kv_cache_dtype": "int4"}, "CONFIG_INVALID", "kv_cache_dtype is 'int4'"),
        ({"spec_tokens": -1}, "CONFIG_INVALID", "spec_tokens is -1"),
        ({"spec_tokens": 65}, "CONFIG_INVALID", "spec_tokens is 65"),
        ({"spec_tokens": 1.5}, "CONFIG_INVALID", "spec_tokens is 1.5"),
        ({"spec_tokens": None}, "CONFIG_INVALID", "spec_tokens is None"),
        ({"quantize": "int3"}, "CONFIG_INVALID", "quantize is 'int3'"),
        ({"quantize": 4}, "CONFIG_INVALID", "quantize is 4"),
        ({"quantize": "int4", "group_size": 48}, "CONFIG_INVALID", "group_size is 48"),
        ({"quantize": "int4", "group_size": 7}, "CONFIG_INVALID", "group_size is 7"),
        ({"quantize": "w8a8", "group_size": 64}, "CONFIG_INVALID", "group_size is set, but w8a8 has no groups"),
        ({"quantize": "int4", "group_size": "channel"}, "SCHEME_INVALID", "int4 has groups of 'channel'"),
        ({"group_size": 64}, "CONFIG_INVALID", "group_size is set, but weights are not quantized"),
        ({"algo": "gptq"}, "CONFIG_INVALID", "algo is set, but weights are not quantized"),
        ({"quantize": "w8a8", "algo": "awq"}, "CONFIG_INVALID", "algo is 'awq'"),
        ({"quantize": "int8", "raise_share": 0.5}, "CONFIG_INVALID", "raise_share is set, but `quantize` is int8"),
        ({"quantize": "int4", "raise_share": 2.0}, "CONFIG_INVALID", "raise_share is 2"),
        ({"quantize": "int8", "max_kl": 0.1}, "CONFIG_INVALID", "max_kl is set"),
        ({"quantize": "int4", "max_kl": 0.0}, "CONFIG_INVALID", "max_kl is 0"),
        ({"quantize": "int4", "algo": "rtn", "max_kl": 0.1}, "CONFIG_INVALID", "max_kl is set"),
        ({"quantize": "int4", "max_kl": 0.1, "raise_share": 0.1}, "CONFIG_INVALID", "both say"),
        ({"quantize": "int8", "round_prompts": False}, "CONFIG_INVALID", "round_prompts is false"),
        ({"quantize": "int4", "ops": "standard", "round_prompts": False}, "CONFIG_INVALID", "round_prompts is false"),
        ({"prune": "1:4"}, "CONFIG_INVALID", "prune is '1:4'"),
        ({"prune": 1.0}, "CONFIG_INVALID", "prune is 1.0"),
        ({"prune": "2:4", "prune_algo": "magnitude"}, "CONFIG_INVALID", "prune_algo is 'magnitude'"),
        ({"prune_algo": "wanda"}, "CONFIG_INVALID", "prune_algo is set, but nothing is pruned"),
        ({"drop_layers": -1}, "CONFIG_INVALID", "drop_layers is -1"),
        ({"max_seq_len": 1}, "CONFIG_INVALID", "max_seq_len is 1"),
        ({"drop_layers": 1, "calib": "no such file"}, "TEXT_NOT_FOUND", "no such file"),
        ({"prune": 0.5, "calib": "no such file"}, "TEXT_NOT_FOUND", "no such file"),
        ({"quantize": "int4", "calib_samples": 0}, "CONFIG_INVALID", "calib_samples is 0"),
        ({"quantize": "int4", "calib": "no such file"}, "TEXT_NOT_FOUND", "no such file"),
        ({"dtype": "bf16"}, "DTYPE_SLOW", "bf16"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, options: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(LlmcError) as caught:
        llmc.compile(tmp_path / "no such model", tmp_path / "out", **options)
    error = caught.value
    assert error.code == code and message.lower() in error.what.lower() and error.hint
    assert code == "TEXT_NOT_FOUND" or isinstance(error, UsageError)
    assert not list(tmp_path.iterdir())


def test_config_and_options_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CONFIG_INVALID: config and quantize"):
        llmc.compile("demo", tmp_path / "out", CompileConfig(), quantize="int8")


def test_an_empty_calibration_file(tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_text(" \n")
    with pytest.raises(LlmcError, match="TEXT_EMPTY"):
        llmc.compile(tmp_path / "no such model", tmp_path / "out", quantize="int4", calib=text)


def test_algorithms() -> None:
    defaults = {name: CompileConfig(quantize=name).algorithm for name in ALGORITHMS}
    assert defaults == {"int8": "smoothquant", "int4": "gptq", "w8a8": "smoothquant", "fp8": "gptq", "nf4": "rtn"}
    assert CompileConfig(quantize="int4", algo="awq").algorithm == "awq"
    assert not CompileConfig(quantize="int4", algo="rtn").raises and CompileConfig(quantize="int4").raises
    assert not CompileConfig(quantize="int4", raise_share=0.0).raises


def test_pruning() -> None:
    assert not CompileConfig().reads_text
    chosen = CompileConfig(prune="2:4")
    assert chosen.prune_algorithm == "sparsegpt" and chosen.reads_text and not chosen.calibrates
    assert CompileConfig(prune=0.3, prune_algo="wanda").prune_algorithm == "wanda"
    dropping = CompileConfig(drop_layers=1, quantize="int4", algo="rtn")
    assert dropping.reads_text and not dropping.calibrates, "the text is not for quantization"


@pytest.mark.parametrize(("given", "parsed"), [("2:4", (0.5, 4)), ("0.25", (0.25, None)), (0.3, (0.3, None))])
def test_sparsity(given: str | float, parsed: tuple[float, int | None]) -> None:
    assert parse_sparsity(given) == parsed
