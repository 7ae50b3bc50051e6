"""Tests of the checks before a build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorrt_decoders import Decoder, write_decoder

from llmc.compiler.targets.tensorrt import preflight
from llmc.compiler.targets.tensorrt.forecast import Forecast
from llmc.compiler.targets.tensorrt.preflight import available_memory, check_before_build, check_caches, check_space
from llmc.errors import LlmcError
from llmc.runtimes.artifact.manifest import CacheSpec
from llmc.runtimes.engines.tensorrt.library import TensorRt

CACHE = CacheSpec("static", 2, 256, 256, 24_320, "bf16")
FORECAST = Forecast(data_bytes=10, plan_bytes=2_000_000_000, peak_bytes=5_000_000_000)


def library(*capabilities: str) -> TensorRt:
    """Return a library that builds for some compute capabilities."""
    module: Any = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(capabilities)))
    return TensorRt("tensorrt_rtx", "1.7", module)


RTX = library("NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
DATA_CENTRE = TensorRt("tensorrt", "10.15", SimpleNamespace())


def refusal(call: Any, *arguments: Any) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        call(*arguments)
    return caught.value


def test_caches_within_the_limits_of_attention_are_accepted() -> None:
    check_caches([CACHE])


@pytest.mark.parametrize(
    ("cache", "number"),
    [
        (replace(CACHE, key_dim=512), "512"),
        (replace(CACHE, value_dim=288), "288"),
        (replace(CACHE, length=24_321), "24,321"),
    ],
)
def test_caches_that_attention_cannot_read_are_refused(cache: CacheSpec, number: str) -> None:
    error = refusal(check_caches, [CACHE, cache])
    assert error.code == "TRT_UNSUPPORTED" and number in error.what


def test_too_little_memory_or_disk_is_refused_with_the_numbers() -> None:
    check_space(FORECAST, 5_000_000_000, 2_000_000_000)
    check_space(FORECAST, None, 2_000_000_000)
    memory = refusal(check_space, FORECAST, 4_900_000_000, 2_000_000_000)
    assert memory.code == "TRT_MEMORY" and "5.0 GB" in memory.what and "4.9 GB" in memory.what
    disk = refusal(check_space, FORECAST, 5_000_000_000, 1_900_000_000)
    assert disk.code == "TRT_MEMORY" and "2.0 GB" in disk.what and "1.9 GB" in disk.what


def test_memory_that_is_available_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(preflight, "MEMORY_INFO", info)
    monkeypatch.setattr(preflight, "MEMORY_LIMIT", limit)
    assert available_memory() is None
    info.write_text("MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n")
    assert available_memory() == 20_480_000_000
    limit.write_text("max\n")
    assert available_memory() == 20_480_000_000
    limit.write_text("8000000000\n")
    assert available_memory() == 8_000_000_000


@pytest.fixture
def check(tmp_path: Path) -> Any:
    def run(decoder: Decoder, tensorrt: TensorRt, *sms: str) -> Forecast:
        graph = write_decoder(decoder, tmp_path)
        return check_before_build(tensorrt, graph, decoder.caches, list(sms), tmp_path)

    return run


def test_a_build_that_fits_is_forecast(check: Any) -> None:
    forecast = check(Decoder(layers=1), RTX, "8.9", "12.0")
    assert forecast.data_bytes < forecast.plan_bytes < forecast.peak_bytes


@pytest.mark.parametrize("sms", [("9.0",), ("8.9", "10.3"), ()])
def test_gpus_that_the_library_lacks_are_refused(check: Any, sms: tuple[str, ...]) -> None:
    error = refusal(check, Decoder(layers=1), RTX, *sms)
    assert error.code == "TRT_SM_UNSUPPORTED"
    assert "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in error.hint


def test_the_data_centre_library_builds_for_one_gpu(check: Any) -> None:
    check(Decoder(layers=1), DATA_CENTRE, "9.0")
    error = refusal(check, Decoder(layers=1), DATA_CENTRE, "9.0", "10.0")
    assert error.code == "TRT_SM_UNSUPPORTED" and "this machine" in error.what


@pytest.mark.parametrize(
    ("decoder", "early", "first"),
    [
        (Decoder(layers=1, scheme="fp8"), "8.6", "8.9"),
        (Decoder(layers=1, scheme="int4"), "7.5", "8.0"),
        (Decoder(layers=1, dtype="bf16"), "7.5", "8.0"),
    ],
    ids=["fp8", "int4", "bf16"],
)
def test_dtypes_that_a_gpu_lacks_are_refused(check: Any, decoder: Decoder, early: str, first: str) -> None:
    check(decoder, RTX, first, "12.0")
    error = refusal(check, decoder, RTX, early, "12.0")
    assert error.code == "TRT_UNSUPPORTED"
    assert f"capability {early} can't" in error.what and f"{first} and later" in error.hint


def test_dtypes_of_all_gpus_are_accepted(check: Any) -> None:
    check(Decoder(layers=1, scheme="w8a8", wide="int8"), RTX, "7.5")
