"""Check before a build: what TensorRT can't do, and what the build needs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ....errors import LlmcError
from ....runtimes.artifact.manifest import CacheSpec
from ....runtimes.engines.tensorrt.library import TensorRt
from ....runtimes.engines.tensorrt.section import TensorRtSection
from .config import check_sms
from .forecast import Forecast, WeightSummary, forecast_build, summarize_weights

# Beyond these, attention is computed in parts, with all its scores in memory.
_MOST_HEAD_DIM = 256
_MOST_CACHE_SLOTS = 24_320
_FIRST_SM_WITH_FP8 = (8, 9)
_MEMORY_INFO = Path("/proc/meminfo")


def check_before_build(
    library: TensorRt,
    path: Path,
    section: TensorRtSection,
    caches: Sequence[CacheSpec],
    sms: list[str],
    folder: Path,
) -> Forecast:
    """Refuse a build that would fail, and return what the others need.

    Args:
        path: the ONNX file.
        folder: for the plan.

    Raises:
        LlmcError: TRT_SM_UNSUPPORTED, TRT_UNSUPPORTED or TRT_MEMORY.
    """
    check_sms(library, sms)
    check_caches(caches)
    weights = summarize_weights(path)
    _check_formats(weights, sms)
    forecast = forecast_build(weights, section)
    check_space(forecast, available_memory(), shutil.disk_usage(folder).free)
    return forecast


def check_caches(caches: Sequence[CacheSpec]) -> None:
    """Refuse caches that no attention kernel can read.

    Raises:
        LlmcError: TRT_UNSUPPORTED.
    """
    for cache in caches:
        check_size(max(cache.key_dim, cache.value_dim), cache.length, "An attention")


def check_size(head_dim: int, positions: int, subject: str) -> None:
    """Refuse an attention with larger heads or more positions than the kernels take.

    Args:
        subject: what the message begins with.

    Raises:
        LlmcError: TRT_UNSUPPORTED.
    """
    if head_dim > _MOST_HEAD_DIM:
        raise LlmcError(
            "TRT_UNSUPPORTED",
            f"{subject} has heads of dimension {head_dim}; TensorRT's kernels reach {_MOST_HEAD_DIM}.",
            "Compile the model for another target.",
        )
    if positions > _MOST_CACHE_SLOTS:
        raise LlmcError(
            "TRT_UNSUPPORTED",
            f"{subject} has a cache of {positions:,} positions; TensorRT's kernels for decoding read up to "
            f"{_MOST_CACHE_SLOTS:,}.",
            f"Set --max-seq-len {_MOST_CACHE_SLOTS} or less.",
        )


def check_space(forecast: Forecast, memory: int | None, disk: int) -> None:
    """Refuse a build that needs more memory or disk space than there is.

    Args:
        memory: available bytes, or None if unknown.
        disk: free bytes for the plan.

    Raises:
        LlmcError: TRT_MEMORY.
    """
    if memory is not None and forecast.peak_bytes > memory:
        raise LlmcError(
            "TRT_MEMORY",
            f"Building the engine takes about {_gigabytes(forecast.peak_bytes)} of memory; "
            f"{_gigabytes(memory)} is available.",
            "Quantize the weights (--int4 takes the least), close other programs, or use a larger machine.",
        )
    if forecast.plan_bytes > disk:
        raise LlmcError(
            "TRT_MEMORY",
            f"The engine takes about {_gigabytes(forecast.plan_bytes)} of disk space; {_gigabytes(disk)} is free.",
            "Free some space, or write to another disk.",
        )


def available_memory() -> int | None:
    """Return the memory in bytes that a process could still get, or None if unknown."""
    try:
        lines = _MEMORY_INFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _check_formats(weights: WeightSummary, sms: list[str]) -> None:
    if "fp8" in weights.bytes_by_dtype:
        check_fp8(sms)


def check_fp8(sms: list[str]) -> None:
    """Refuse fp8 on GPUs that don't have it.

    Raises:
        LlmcError: TRT_UNSUPPORTED.
    """
    early = [sm for sm in sms if tuple(map(int, sm.split("."))) < _FIRST_SM_WITH_FP8]
    if early:
        raise LlmcError(
            "TRT_UNSUPPORTED",
            f"GPUs of compute capability {', '.join(early)} have no fp8.",
            "Use --int8 or --quantize w8a8, or build for 8.9 and later only.",
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
