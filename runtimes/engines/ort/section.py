"""The section of the manifest that target "ort" writes and its engine reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...artifact.decode import left_out
from ...artifact.manifest import Manifest, invalid_manifest

PAGE_BYTES = 4096
# By device, the types of the numbers in a cache that the engine knows.
CACHE_DTYPES = {"cpu": ("fp32", "int8", "fp8"), "cuda": ("fp16", "bf16")}
_ITEM_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "int16": 2, "float16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "float64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class DerivedSpec:
    """An int8 matrix [columns, rows] of a graph, made of codes in a file when the graph is opened.

    `rows` (output channels) and `columns` (input channels) are those of the codes; the matrix is their transpose, as
    another kernel wants it.

    Attributes:
        zeros_offset: zero points by group, packed as codes are, each output channel from a byte of its own on. None: 8.
            Int4 only.
        multiples_offset: int8 by group: the group's scale over its channel's scale. Int4 only.
        offset: where the graph looks for the matrix, in the file of all that are made for it.
    """

    name: str
    scheme: str
    rows: int
    columns: int
    group_size: int
    file: str
    codes_offset: int
    zeros_offset: int | None
    multiples_offset: int | None
    offset: int


@dataclass(frozen=True)
class StoredSpec:
    """A weight that is in a file of the artifact as a graph takes it.

    Attributes:
        dtype: numpy's name, or "float8_e4m3fn" or "float8_e5m2".
    """

    name: str
    dtype: str
    shape: list[int]
    file: str
    offset: int


@dataclass(frozen=True)
class GraphFile:
    """The file of a graph.

    A graph with derived matrices reads weights from a folder that is made for it and from nowhere else: `stored` are
    its other weights.

    Attributes:
        batch_tokens: the graph also serves calls for several sequences with at least so many tokens in all; None: the
            tokens of each sequence decide.
    """

    file: str
    derived: list[DerivedSpec] = field(default_factory=list)
    stored: list[StoredSpec] = field(default_factory=list)
    batch_tokens: int | None = left_out(None)


@dataclass(frozen=True)
class OrtSection:
    """What the engine needs to know.

    Attributes:
        graphs: by the name of their phase.
        device: what runs them: a CPU, or an NVIDIA GPU by ONNX Runtime's CUDA provider.
    """

    graphs: dict[str, GraphFile]
    device: Literal["cpu", "cuda"] = left_out("cpu")


def read_section(manifest: Manifest) -> OrtSection:
    """Return the section, its names, offsets and sizes checked against the manifest's files.

    Raises:
        LlmcError: ARTIFACT_INVALID.
    """
    section = manifest.read_section(OrtSection)
    if section.graphs.keys() != manifest.phases.keys():
        raise invalid_manifest("its phases and its graphs have different names")
    where = {"cpu": "a CPU", "cuda": "a GPU"}[section.device]
    if unknown := {cache.dtype for cache in manifest.caches} - set(CACHE_DTYPES[section.device]):
        raise invalid_manifest(f"ONNX Runtime keeps no caches in {min(unknown)} on {where}")
    if section.device == "cuda" and any(cache.kind != "static" for cache in manifest.caches):
        raise invalid_manifest(f"ONNX Runtime keeps no ring caches on {where}")
    for name, graph in section.graphs.items():
        if graph.file not in manifest.files:
            raise invalid_manifest(f"graph {name!r} is in {graph.file!r}, which is not among the files")
        # Each matrix may begin on a page of its own, and no farther.
        room = sum(derived.rows * derived.columns + PAGE_BYTES for derived in graph.derived)
        for derived in graph.derived:
            _check_derived(manifest, derived)
            if derived.offset + derived.rows * derived.columns > room:
                raise invalid_manifest(f"the derived matrix {derived.name!r} is out of place")
        for stored in graph.stored:
            if stored.dtype not in _ITEM_BYTES or min([*stored.shape, 0]) < 0:
                raise invalid_manifest(f"the weight {stored.name!r} has no known type or size")
            _check_range(manifest, stored.name, stored.file, stored.offset, stored_bytes(stored))
    return section


def stored_bytes(stored: StoredSpec) -> int:
    """Return how many bytes a stored weight takes."""
    return math.prod(stored.shape) * _ITEM_BYTES[stored.dtype]


def _check_derived(manifest: Manifest, derived: DerivedSpec) -> None:
    rows, columns, group = derived.rows, derived.columns, derived.group_size
    # Two codes of 4 bits share a byte.
    is_odd = derived.scheme == "int4" and group % 2
    is_known = derived.scheme in ("int8", "int4")
    if not is_known or min(rows, columns, group) < 1 or columns % group or is_odd or derived.offset < 0:
        raise invalid_manifest(f"the derived matrix {derived.name!r} has an impossible form")
    per_byte, groups = (1, 1) if derived.scheme == "int8" else (2, columns // group)
    ranges = [(derived.codes_offset, rows * columns // per_byte)]
    if derived.zeros_offset is not None:
        ranges.append((derived.zeros_offset, rows * ((groups + 1) // 2)))
    if derived.multiples_offset is not None:
        ranges.append((derived.multiples_offset, rows * groups))
    for offset, length in ranges:
        _check_range(manifest, derived.name, derived.file, offset, length)


def _check_range(manifest: Manifest, name: str, file: str, offset: int, length: int) -> None:
    known = manifest.files.get(file)
    if known is None or offset < 0 or offset + length > known.bytes:
        raise invalid_manifest(f"{name!r} is not within the file {file!r}")
