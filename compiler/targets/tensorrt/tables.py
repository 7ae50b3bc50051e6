"""Tables of engines for `llmc inspect`. All figures come from the records that the builds wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ....runtimes.artifact.manifest import Manifest
from ....runtimes.engines.tensorrt.record import BuildRecord, ProfileRecord, read_record
from ....runtimes.engines.tensorrt.section import TensorRtSection, read_section
from ..base import Table

_MEGABYTE = 1e6


def engine_tables(folder: Path, manifest: Manifest) -> list[Table]:
    """Return the tables of all engines of an artifact."""
    section = read_section(manifest)
    if not section.plans:
        how = [["engine", f"none; build one: llmc finalize {folder}"]]
        return [Table("Engines", (), how)]
    return [table for plan in section.plans for table in _tables(plan.file, section, read_record(folder / plan.record))]


def engine_remarks(folder: Path, manifest: Manifest) -> list[str]:
    """Return a sentence for each kind of check that an engine failed, and one for what it computes in a slower way."""
    said = []
    for plan in read_section(manifest).plans:
        record = read_record(folder / plan.record)
        found: dict[str, list[str]] = {}
        for problem in record.problems:
            found.setdefault(problem.check, []).append(problem.what)
        for check, problems in found.items():
            more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
            said.append(f"The engine fails the check {check!r}: {problems[0]}{more}")
        if slow := len({(one.profile, one.what) for one in record.fallbacks}):
            said.append(f"Attentions that no single kernel computes: {slow}. `llmc inspect` says why.")
    return said


def _tables(name: str, section: TensorRtSection, record: BuildRecord) -> Iterator[Table]:
    library = f"{record.library} {record.version}"
    yield Table(
        f"Engine {name}",
        (),
        [
            ["compute capabilities", ", ".join(record.sms)],
            ["built by", f"{library} in {record.seconds:.0f} s" + _peak(record)],
            ["plan", _size(record.plan_bytes)],
            ["weights", f"{_size(record.weight_bytes)}, {record.weight_ratio:.2f} times those of the graph"],
            *(["warning", warning] for warning in record.warnings),
        ],
    )
    yield Table(
        "Profiles",
        ["profile", "sequences", "tokens", "kernels", "fused attentions", "caches in place", "activations"],
        [_profile_row(name, section, profile) for name, profile in record.profiles.items()],
    )
    yield Table(
        "Matrix multiplications",
        ["profile", "count", "weight", "read as", "input", "read as", "shape", "kernel"],
        [row for name, profile in record.profiles.items() for row in _gemm_rows(name, profile)],
    )
    if record.problems:
        yield Table("Checks that failed", ["check", "what"], [[one.check, one.what] for one in record.problems])
    slow = [[one.profile, one.what, one.reason] for one in record.fallbacks]
    for profile_name, profile in record.profiles.items():
        slow += [
            [profile_name, kernel, f"writes out the weights of {', '.join(nodes)}"]
            for kernel, nodes in profile.expanded.items()
        ]
        slow += [[profile_name, cache, f"is copied by {kernel}"] for cache, kernel in profile.caches.copied.items()]
    if slow:
        yield Table("Fallbacks", ["profile", "what", "reason"], slow)


def _profile_row(name: str, section: TensorRtSection, profile: ProfileRecord) -> list[object]:
    fused = sum(attention.kernel is not None for attention in profile.attentions)
    shape = section.profiles[name]
    return [
        name, f"1 to {shape.batch}" if shape.batch > 1 else "1", f"1 to {shape.tokens}" if shape.tokens > 1 else "1",
        profile.kernels, f"{fused} of {len(profile.attentions)}",
        f"{len(profile.caches.in_place)} of {len(profile.caches.in_place) + len(profile.caches.copied)}",
        _size(profile.activation_bytes),
    ]  # fmt: skip


def _gemm_rows(name: str, profile: ProfileRecord) -> Iterator[list[object]]:
    """Yield one row for all multiplications that are alike."""
    found = Counter(
        (g.requested, g.weight, g.requested_input, g.input or "in the kernel", " x ".join(map(str, g.shape)), g.kernel)
        for g in profile.gemms
    )
    for (requested, weight, requested_input, read, shape, kernel), count in found.items():
        yield [name, count, requested, weight, requested_input, read, shape, kernel]


def _peak(record: BuildRecord) -> str:
    return "" if record.peak_bytes is None else f", with {_size(record.peak_bytes)} of memory at its peak"


def _size(count: int) -> str:
    return f"{count / _MEGABYTE:,.0f} MB"
