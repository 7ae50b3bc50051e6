"""Check that an engine reads weights and caches as its graph stores them, by the record of its build."""

from __future__ import annotations

from collections.abc import Iterator

from ....runtimes.engines.tensorrt.record import BuildRecord, Problem, ProfileRecord
from ....runtimes.engines.tensorrt.section import DECODE

# Profiles that share no weight would double them.
_MOST_WEIGHT_RATIO = 1.3
_QUANTIZED = ("int8", "int4", "fp8")


def check_record(record: BuildRecord, caches: int, most_weight_ratio: float = _MOST_WEIGHT_RATIO) -> list[Problem]:
    """Return the problems of an engine; none if it does what its graph says without copies.

    A reported fallback is no problem.

    Args:
        caches: how many tensors of caches the graph has.
        most_weight_ratio: limit of engine weights over stored weights.
    """
    problems = [
        problem for name, one in record.profiles.items() for problem in _check_profile(record, name, one, caches)
    ]
    if record.weight_ratio > most_weight_ratio:
        ratio = f"{record.weight_ratio:.2f} times the {record.data_bytes} bytes of the graph"
        problems.append(Problem("weight ratio", f"The engine's weights are {ratio}."))
    return problems


def _check_profile(record: BuildRecord, name: str, profile: ProfileRecord, caches: int) -> Iterator[Problem]:
    fallbacks = {one.what for one in record.fallbacks if one.profile == name}
    for attention in profile.attentions:
        if attention.kernel is None and attention.node not in fallbacks:
            yield Problem("attention", f"In {name}, no single kernel computes {attention.node}.")
    for output, kernel in profile.caches.copied.items():
        yield Problem("cache copied", f"In {name}, {kernel} copies {output}.")
    updated = len(profile.caches.in_place) + len(profile.caches.copied)
    if updated != caches:
        yield Problem("cache not in place", f"In {name}, {updated} of {caches} cache tensors are updated.")
    if name == DECODE and not fallbacks:
        for output, kernel in profile.caches.read_in_full.items():
            yield Problem("cache read in full", f"In {name}, {kernel} expands {output} for attention.")
    for gemm in profile.gemms:
        nodes = ", ".join(gemm.nodes)
        if gemm.weight != gemm.requested:
            yield Problem("weight dtype", f"In {name}, {nodes} reads {gemm.weight} weights, not {gemm.requested}.")
        if gemm.requested_input in _QUANTIZED and gemm.input != gemm.requested_input:
            found = gemm.input or "unknown"
            yield Problem("input dtype", f"In {name}, {nodes} reads {found} inputs, not {gemm.requested_input}.")
    for kernel, members in profile.expanded.items():
        yield Problem("weight expanded", f"In {name}, {kernel} writes the weight of {', '.join(members)} out in full.")
    for node in profile.unknown_gemms:
        yield Problem("gemm unknown", f"In {name}, no kernel was found for {node}.")
