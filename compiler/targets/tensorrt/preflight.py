"""Check before a build: what TensorRT can't do, and what the build needs."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from ....errors import LlmcError
from ....runtimes.artifact.manifest import CacheSpec
from ....runtimes.engines.tensorrt.library import TensorRt
from .config import check_sms
from .forecast import Forecast, forecast_build, readable, summarize_weights

# Beyond these, attention is computed in parts, with all its scores in memory.
_MOST_HEAD_DIM = 256
_MOST_CACHE_SLOTS = 24_320
# The first compute capability with kernels for a dtype.
_FIRST_SMS = {"bf16": (8, 0), "int4": (8, 0), "fp8": (8, 9)}
# Where the kernel says how much memory is available, and how much this container may use.
MEMORY_INFO = Path("/proc/meminfo")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_before_build(
    library: TensorRt,
    path: Path,
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
    check_dtypes(weights.bytes_by_dtype, sms)
    forecast = forecast_build(weights)
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


def check_dtypes(dtypes: Collection[str], sms: Sequence[str]) -> None:
    """Refuse dtypes that a GPU can't compute with.

    Args:
        dtypes: names of dtypes and of schemes, such as "bf16" and "int4".

    Raises:
        LlmcError: TRT_UNSUPPORTED.
    """
    for dtype, first in _FIRST_SMS.items():
        early = [sm for sm in sms if tuple(map(int, sm.split("."))) < first]
        if early and dtype in dtypes:
            raise LlmcError(
                "TRT_UNSUPPORTED",
                f"GPUs of compute capability {', '.join(early)} can't compute with {dtype}.",
                f"Use another dtype or scheme, or build for {first[0]}.{first[1]} and later only.",
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
            f"Building the engine takes about {readable(forecast.peak_bytes)} of memory; "
            f"{readable(memory)} is available.",
            "Quantize the weights (--int4 takes the least), close other programs, or use a larger machine.",
        )
    if forecast.plan_bytes > disk:
        raise LlmcError(
            "TRT_MEMORY",
            f"The engine takes about {readable(forecast.plan_bytes)} of disk space; {readable(disk)} is free.",
            "Free some space, or write to another disk.",
        )


def available_memory() -> int | None:
    """Return the memory in bytes that a process could still get, or None if unknown. A container may have a limit."""
    found = []
    with suppress(OSError):
        lines = MEMORY_INFO.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # the limit may be "max"
        found.append(int(MEMORY_LIMIT.read_text()))
    return min(found, default=None)
