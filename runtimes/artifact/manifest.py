"""The manifest: what an artifact says of itself. The same content is always the same bytes."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple, TypedDict

from ...errors import LlmcError

FORMAT = 1
"""The newest manifest format that this version of llmc reads, and the one that it writes."""

MANIFEST = "manifest.json"


class ModelSpec(TypedDict):
    """The model that was compiled. `identity` is its commit or a hash of its content."""

    name: str
    type: str
    identity: str
    vocab_size: int
    layers: int
    parameters: int


@dataclass(frozen=True)
class ScalesSpec:
    """The scales of a cache that is rounded, float32, one for each head of each position: as the cache, inputs and
    the outputs that alias them."""

    key: str
    value: str
    present_key: str
    present_value: str


class CacheBinding(NamedTuple):
    """One of the tensors that make a cache, [slots, heads, length, width]."""

    past: str
    present: str
    width: int
    dtype: str


# Bytes of a number of a cache. An "fp8" is an E4M3 number, which a graph takes as a byte.
_ITEM = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class CacheSpec:
    """One layer's cache: inputs, and the outputs that alias them."""

    key: str
    value: str
    present_key: str
    present_value: str
    kind: Literal["static", "ring"]
    heads: int
    key_dim: int
    value_dim: int
    length: int
    """Slots along the sequence."""
    dtype: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    """Of the numbers; "int8" and "fp8" are codes, which `scales` belong to."""
    scales: ScalesSpec | None = None

    @property
    def tensors(self) -> list[CacheBinding]:
        """What a runtime keeps from call to call."""
        made = [
            CacheBinding(self.key, self.present_key, self.key_dim, self.dtype),
            CacheBinding(self.value, self.present_value, self.value_dim, self.dtype),
        ]
        if scales := self.scales:
            made.append(CacheBinding(scales.key, scales.present_key, 1, "fp32"))
            made.append(CacheBinding(scales.value, scales.present_value, 1, "fp32"))
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence's slots."""
        return self.heads * self.length * sum(part.width * _ITEM[part.dtype] for part in self.tensors)


# The file, made when a graph is opened, in which the graph looks for its derived matrices.
DERIVED_FILE = "derived"


@dataclass(frozen=True)
class DerivedSpec:
    """An int8 matrix [columns, rows] of a graph, made of codes in a file when the graph is opened.

    `rows` and `columns` are those of the codes; the matrix is their transpose, for another kernel.
    """

    name: str
    scheme: str
    rows: int
    columns: int
    group_size: int
    file: str
    codes_offset: int
    zeros_offset: int | None
    """Of each group, as its codes are packed, each row from a byte of its own on; without them 8. Int4 only."""
    multiples_offset: int | None
    """Of each group, int8: how many times its row's scale a group's is. Int4 only."""
    offset: int
    """Where the graph looks for the matrix, in the file of all that are made for it."""


@dataclass(frozen=True)
class StoredSpec:
    """A weight that lies in a file of the artifact as a graph takes it."""

    name: str
    dtype: str
    """As numpy names it, or "float8_e4m3fn" or "float8_e5m2"."""
    shape: list[int]
    file: str
    offset: int


@dataclass(frozen=True)
class GraphSpec:
    """A graph's file, and how many rows of tokens it is meant for; `max_rows` None is any number.

    A graph with derived matrices looks for them in a folder that is made for it, and can't look elsewhere too:
    `stored` are its other weights.
    """

    file: str
    min_rows: int
    max_rows: int | None
    derived: list[DerivedSpec] = field(default_factory=list)
    stored: list[StoredSpec] = field(default_factory=list)


@dataclass(frozen=True)
class FileSpec:
    """What a file must hold."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The contract between the compiler and the runtimes.

    There is no time and no path of a machine in it: the same inputs give the same artifact.
    """

    format: int
    target: str
    model: ModelSpec
    max_seq_len: int
    graphs: dict[str, GraphSpec]
    """By what they are for: always "step", perhaps "prefill"."""
    caches: list[CacheSpec]
    quantization: dict[str, Any] | None
    built_with: dict[str, str]
    requires: dict[str, str]
    """Module -> range of versions, such as `>=1.30,<2`."""
    files: dict[str, FileSpec] = field(default_factory=dict)
    """By name, with forward slashes; empty until the artifact is written."""
    pruning: dict[str, Any] | None = None
    """What was left out of the model: layers, and weights that became zero."""

    def to_json(self) -> bytes:
        """The canonical bytes."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest whose keys and types are exactly those of this format.

        Raises:
            LlmcError: ARTIFACT_NEWER for a later format, ARTIFACT_INVALID for anything else.
        """
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _invalid(f"it is not JSON: {error}.") from None
        if not isinstance(document, dict) or type(document.get("format")) is not int:
            raise _invalid("it names no format.")
        # Before the keys: those of a later format may be others.
        if document["format"] > FORMAT:
            raise LlmcError(
                "ARTIFACT_NEWER",
                f"The artifact has format {document['format']}; this llmc reads formats up to {FORMAT}.",
                "Update llmc: pip install --upgrade llmc",
            )
        manifest = _decode(cls, document, "the manifest")
        assert isinstance(manifest, cls)
        manifest._check()
        return manifest

    def _check(self) -> None:
        for name in self.files:
            if not _stays_inside(name):
                raise _invalid(f"the file name {name!r} is not a plain relative one.")
        if "step" not in self.graphs:
            raise _invalid("it has no graph 'step'.")
        for name, graph in self.graphs.items():
            if graph.file not in self.files:
                raise _invalid(f"graph {name!r} is in {graph.file!r}, which is not among the files.")


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = bool(name) and str(path) == name and not path.is_absolute() and ".." not in path.parts and name != "."
    return plain and "\\" not in name and "\0" not in name and not PureWindowsPath(name).drive


def _invalid(why: str) -> LlmcError:
    return LlmcError("ARTIFACT_INVALID", f"{MANIFEST} can't be read: {why}", "Compile again: llmc compile MODEL -o DIR")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`; whatever doesn't fit is an error that says where."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) or typing.is_typeddict(kind):
        assert isinstance(kind, type)
        return kind(**_decode_keys(kind, value, where))
    if origin in (typing.Union, types.UnionType):
        some = next(a for a in arguments if a is not type(None))
        return None if value is None else _decode(some, value, where)
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    # bool is an int to Python, not to JSON.
    if kind is Any or (isinstance(kind, type) and type(value) is kind):
        return value
    raise _invalid(f"{where} is {value!r:.60}, not {_name(kind)}.")


def _decode_keys(kind: type, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _invalid(f"{where} is {value!r:.60}, not an object.")
    hints = typing.get_type_hints(kind)
    if missing := sorted(hints.keys() - value.keys()):
        raise _invalid(f"{where} lacks {', '.join(missing)}.")
    if unknown := sorted(value.keys() - hints.keys()):
        raise _invalid(f"{where} has unknown keys: {', '.join(map(str, unknown))}.")
    return {name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return {int: "a whole number", str: "text"}.get(kind) or str(kind).partition("[")[0]
