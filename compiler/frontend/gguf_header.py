"""The header of a GGUF file: its metadata, and the type, shape and offset of each tensor."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ...errors import LlmcError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_T = GGMLQuantizationType
SUPPORTED_TYPES = frozenset(
    {_T.F32, _T.F16, _T.BF16, _T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q5_1, _T.Q8_0, _T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K, _T.Q6_K}
)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_PREAMBLE = struct.Struct("<4sIQQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_DTYPES = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
_SCALARS = {kind: np.dtype(code) for kind, code in enumerate(_DTYPES) if code}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensorInfo:
    """The entry of one tensor: its shape in torch's order, its type, and its place in the file in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """All that a GGUF file holds before the data of its first tensor."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensorInfo]
    spans: dict[str, tuple[int, int]]
    """The first byte of each metadata entry, its key included, and the byte after its last."""

    @cached_property
    def architecture(self) -> str:
        """The model family as GGUF spells it, such as ``llama``."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise corrupt(self.path, "the metadata has no general.architecture")
        return name


def corrupt(path: Path, what: str) -> LlmcError:
    """Return the error for a file whose bytes violate the format."""
    return LlmcError("GGUF_CORRUPT", f"{path}: {what}.", "Fetch or convert the file again.")


def read_header(path: Path) -> GgufHeader:
    """Parse the header of ``path`` and check that the file contains every tensor completely.

    The reader of the ``gguf`` package creates an array view for each vocabulary entry. That takes seconds for 50,000
    entries and tens of seconds for large vocabularies. This function takes a tenth of a second.

    Raises:
        LlmcError: ``MODEL_NOT_FOUND``, ``GGUF_CORRUPT``, ``GGUF_VERSION`` (another version or byte order),
            ``GGUF_SPLIT`` (one shard of several) or ``GGUF_TYPE`` (a tensor type that llmc can't read).
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < _PREAMBLE.size:
                raise corrupt(path, f"it has only {path.stat().st_size} bytes, fewer than any GGUF header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _parse(path, view)
    except OSError as error:
        raise LlmcError("MODEL_NOT_FOUND", f"{path} can't be opened: {error.strerror}.") from error


class _Cursor:
    """A position in the header. Reading beyond the end of the file is an error that names what was read."""

    def __init__(self, path: Path, view: mmap.mmap, position: int) -> None:
        self.path, self.view, self.position, self.end = path, view, position, len(view)

    def take(self, size: int, what: str) -> int:
        start = self.position
        if size > self.end - start:
            raise corrupt(self.path, f"{what} at byte {start} needs {size} bytes, but only {self.end - start} are left")
        self.position = start + size
        return start

    def number(self, layout: struct.Struct, what: str) -> int:
        return layout.unpack_from(self.view, self.take(layout.size, what))[0]

    def string(self, what: str) -> str:
        size = self.number(_U64, what)
        start = self.take(size, what)
        try:
            return self.view[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"{what} at byte {start} is not UTF-8") from error

    def scalars(self, dtype: np.dtype, count: int, what: str) -> list[Any]:
        start = self.take(dtype.itemsize * count, what)
        return np.frombuffer(self.view[start : self.position], dtype).tolist()

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind], 1, what)[0]
        if kind != ARRAY:
            raise corrupt(
                self.path, f"{what} at byte {self.position} has the value type {kind}, which GGUF does not define"
            )
        item, count = self.number(_U32, what), self.number(_U64, what)
        if item in _SCALARS:
            return self.scalars(_SCALARS[item], count, what)
        if item == STRING:
            return [self.string(what) for _ in range(count)]
        raise corrupt(
            self.path, f"{what} at byte {self.position} is an array of value type {item}, which llmc can't read"
        )


def _parse(path: Path, view: mmap.mmap) -> GgufHeader:
    magic, version, tensor_count, entry_count = _PREAMBLE.unpack_from(view)
    if magic != MAGIC:
        raise corrupt(path, f"it is not a GGUF file, for it begins with {magic!r}")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "is big-endian" if swapped else f"has GGUF version {version}"
        raise LlmcError(
            "GGUF_VERSION", f"{path} {what}; llmc reads the little-endian versions 2 and 3.", "Convert the file."
        )

    cursor = _Cursor(path, view, _PREAMBLE.size)
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(entry_count):
        start = cursor.position
        key = cursor.string(f"the key of metadata entry {index}")
        if key in metadata:
            raise corrupt(path, f"metadata entry {key} occurs again at byte {start}")
        metadata[key] = cursor.value(cursor.number(_U32, f"metadata entry {key}"), f"metadata entry {key}")
        spans[key] = (start, cursor.position)
    if metadata.get("split.count", 0) not in (0, 1):
        raise LlmcError(
            "GGUF_SPLIT",
            f"{path} is one of {metadata['split.count']} shards.",
            "Join them first: llama-gguf-split --merge FIRST_SHARD OUTPUT.",
        )

    entries = [_tensor_entry(cursor, index) for index in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise corrupt(path, f"general.alignment is {alignment!r}, not a power of two")
    data_start = -(-cursor.position // alignment) * alignment

    tensors: dict[str, GgufTensorInfo] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise corrupt(path, f"tensor {name} occurs twice")
        tensors[name] = _tensor_info(path, name, shape, type_id, data_start + offset, cursor.end)
    return GgufHeader(path, version, metadata, tensors, spans)


def _tensor_entry(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"the name of tensor {index}")
    what = f"the entry of tensor {name}"
    dims = cursor.number(_U32, what)
    if dims > MAX_DIMS:
        raise corrupt(cursor.path, f"tensor {name} has {dims} dimensions, but GGUF allows {MAX_DIMS}")
    # GGUF lists the fastest-varying dimension first.
    shape = tuple(cursor.number(_U64, what) for _ in range(dims))[::-1]
    return name, shape, cursor.number(_U32, what), cursor.number(_U64, what)


def _tensor_info(path: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int, end: int) -> GgufTensorInfo:
    known = type_id in GGMLQuantizationType._value2member_map_
    if not known or GGMLQuantizationType(type_id) not in SUPPORTED_TYPES:
        spelled = GGMLQuantizationType(type_id).name if known else f"number {type_id}"
        readable = ", ".join(sorted(kind.name for kind in SUPPORTED_TYPES))
        raise LlmcError(
            "GGUF_TYPE",
            f"{path}: tensor {name} has the ggml type {spelled}, which llmc can't read.",
            f"Use one of {readable}.",
        )
    kind = GGMLQuantizationType(type_id)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    length = shape[-1] if shape else 1
    if length % block:
        raise corrupt(
            path, f"the last dimension of tensor {name} is {length}, no multiple of the {block} of a {kind.name} block"
        )
    nbytes = prod(shape) // block * block_bytes
    if offset + nbytes > end:
        raise corrupt(path, f"tensor {name} occupies bytes {offset} to {offset + nbytes}, but the file ends at {end}")
    return GgufTensorInfo(name, shape, kind, offset, nbytes)
