"""The manifest: what an artifact is, in plain data. The same content always gives the same bytes.

It has a core that every runtime reads, and one section that only the target's own engine reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar

from ...errors import LlmcError
from .decode import DecodeError, decode, encode, left_out

FORMAT = 2
"""The manifest format that this version of llmc reads and writes."""

MANIFEST = "manifest.json"
# Bytes of a number in a cache. "fp8" is an E4M3 number.
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
# Caches of one sequence may not be larger than this: a manifest must not make a runtime allocate without bounds.
_MOST_CACHE_BYTES = 1 << 40

DtypeName = Literal["fp32", "fp16", "bf16"]
"""A dtype to compute in."""

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSpec:
    """The model that was compiled. `identity` is its commit, or a hash of its content."""

    name: str
    type: str
    identity: str
    vocab_size: int
    layers: int
    parameters: int


@dataclass(frozen=True)
class Phase:
    """How many tokens per sequence and call a graph serves; `max_tokens` None is any number."""

    min_tokens: int
    max_tokens: int | None = None

    def serves(self, count: int) -> bool:
        """Return True if a call with so many tokens per sequence may use the graph."""
        return self.min_tokens <= count and (self.max_tokens is None or count <= self.max_tokens)


@dataclass(frozen=True)
class CachePart:
    """One tensor of a cache, [slots, heads, length, width].

    Attributes:
        role: "key", "value", "key_scale" or "value_scale".
    """

    role: str
    width: int
    dtype: str


@dataclass(frozen=True)
class CacheSpec:
    """The cache of one attention.

    Attributes:
        kind: "static": position p is in slot p. "ring": in slot p % length.
        length: slots along the sequence.
        dtype: of the numbers. "int8" and "fp8" are codes.
        slack: how many more positions a ring keeps than its attention sees, so that a sequence can go back by one
            position more than that.
        scales: what a scale of codes is for. "token": a token and head; they are float32, and parts of the cache.
            "channel": a channel of a head; they are constants of the graphs.
    """

    kind: Literal["static", "ring"]
    heads: int
    key_dim: int
    value_dim: int
    length: int
    dtype: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    slack: int = left_out(0)
    scales: Literal["token", "channel"] = left_out("token")

    @property
    def is_quantized(self) -> bool:
        """True if keys and values are quantized."""
        return self.dtype in ("int8", "fp8")

    @property
    def parts(self) -> list[CachePart]:
        """The tensors that a runtime keeps from call to call, in the order of the graphs' inputs."""
        parts = [CachePart("key", self.key_dim, self.dtype), CachePart("value", self.value_dim, self.dtype)]
        if self.is_quantized and self.scales == "token":
            parts += [CachePart("key_scale", 1, "fp32"), CachePart("value_scale", 1, "fp32")]
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes that one sequence takes."""
        return self.heads * self.length * sum(part.width * _ITEM_BYTES[part.dtype] for part in self.parts)


@dataclass(frozen=True)
class MaxKlSpec:
    """The result of `--max-kl`: the limit, the measured divergence with its margin, over how many tokens and trials."""

    limit: float
    measured: float
    tokens: int
    trials: int


@dataclass(frozen=True)
class QuantizationSpec:
    """How the weights were quantized.

    Attributes:
        scheme: as it was asked for; "stored" for codes that the checkpoint brought; None if no weight is quantized, but
            the checkpoint's were.
        precision: the key of the gate's limits.
        algorithm: "rtn", "smoothquant", "awq", "gptq", "as stored", or "dequantized" if no codes were kept.
        why: the reason for an algorithm that was not asked for, and for codes that were not kept.
        weights: number of weights by format in words, such as "int4 in groups of 64".
        exact_inputs: linears whose inputs stay exact where the others' are quantized.
    """

    scheme: str | None
    precision: str
    algorithm: str
    why: str
    weights: dict[str, int]
    exact_inputs: int = 0
    max_kl: MaxKlSpec | None = None


@dataclass(frozen=True)
class DroppedLayers:
    """Layers that were left out, and the importance of every layer by name."""

    dropped: list[str]
    importance: dict[str, float]


@dataclass(frozen=True)
class PrunedWeights:
    """Weights with zeros.

    Attributes:
        sparsity: the share of zeros in the pruned weights.
        pruned: how many weights have zeros.
        whole: how many weights have none, by the reason.
    """

    pattern: str
    algorithm: str
    sparsity: float
    pruned: int
    whole: dict[str, int]


@dataclass(frozen=True)
class PruningSpec:
    """Layers that were left out, and weights that became zero."""

    layers: DroppedLayers | None = None
    weights: PrunedWeights | None = None


@dataclass(frozen=True)
class FileSpec:
    """The checksum and the size of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Verified:
    """Where the gate compared an artifact with its model. Without reference logits in the artifact, it did nowhere.

    Attributes:
        here: what the gate ran on the compiling machine. "engine": the artifact's own engine. "graph": its graph in
            another runtime, because the engine can't run there.
        on_device: what `load` still has to run on each device before the first answer. "gate": the gate's check, with
            the engine.
    """

    here: Literal["engine", "graph"] = "engine"
    on_device: Literal["nothing", "gate"] = "nothing"


@dataclass(frozen=True)
class Manifest:
    """The contract between the compiler and the runtimes.

    It holds no time and no path of a machine: the same inputs give the same artifact.

    Attributes:
        dtype: what its graphs compute in.
        phases: the graphs by name, and how many tokens per call each serves; "step" serves single tokens.
        section: what only the target's engine reads; see `read_section`.
        requires: range of versions by module, such as `>=1.30,<2`.
        files: by name, with forward slashes; empty until the artifact is written.
        verified: where the gate compared it with the model.
    """

    format: int
    target: str
    model: ModelSpec
    max_seq_len: int
    phases: dict[str, Phase]
    caches: list[CacheSpec]
    quantization: QuantizationSpec | None
    pruning: PruningSpec | None
    section: dict[str, Any]
    built_with: dict[str, str]
    requires: dict[str, str]
    files: dict[str, FileSpec] = field(default_factory=dict)
    dtype: Literal["fp32", "fp16", "bf16"] = left_out("fp32")
    verified: Verified = left_out(Verified())  # noqa: RUF009 (it makes a field)

    @property
    def precision(self) -> str:
        """The precision of the weights: that of the dtype if they are not quantized."""
        return self.quantization.precision if self.quantization else self.dtype

    @property
    def cache_codes(self) -> str | None:
        """The format of quantized keys and values; None if they are not quantized."""
        return next((cache.dtype for cache in self.caches if cache.is_quantized), None)

    @property
    def rollback(self) -> int | None:
        """How many positions a sequence can go back, from the furthest that it has held; None: any number."""
        return min((cache.slack + 1 for cache in self.caches if cache.kind == "ring"), default=None)

    def read_section(self, kind: type[T]) -> T:
        """Return the target's section as an instance of its dataclass.

        Raises:
            LlmcError: ARTIFACT_INVALID if it does not fit.
        """
        try:
            return decode(kind, self.section, "section")
        except DecodeError as error:
            raise invalid_manifest(str(error)) from None

    def to_json(self) -> bytes:
        """Return the canonical bytes."""
        return (json.dumps(encode(self), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest whose keys and types are exactly those of this format.

        Raises:
            LlmcError: ARTIFACT_NEWER or ARTIFACT_OLDER for another format, ARTIFACT_INVALID for anything else.
        """
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise invalid_manifest(f"it is not JSON: {error}") from None
        if not isinstance(document, dict) or type(document.get("format")) is not int:
            raise invalid_manifest("it names no format")
        _check_format(document)  # before the keys, which differ between formats
        try:
            manifest = decode(cls, document, "the manifest")
        except DecodeError as error:
            raise invalid_manifest(str(error)) from None
        manifest._check()
        return manifest

    def _check(self) -> None:
        for name in self.files:
            if not _stays_inside(name):
                raise invalid_manifest(f"the file name {name!r} is not a plain relative one")
        if not self.target.isidentifier():
            raise invalid_manifest(f"the target {self.target!r} is not a name")
        if min(self.model.vocab_size, self.max_seq_len) < 1:
            raise invalid_manifest("vocab_size and max_seq_len must be 1 or more")
        self._check_phases()
        for i, cache in enumerate(self.caches):
            if min(cache.heads, cache.key_dim, cache.value_dim, cache.length) < 1 or cache.length > self.max_seq_len:
                raise invalid_manifest(f"caches[{i}] has an impossible size")
            if not 0 <= cache.slack < (cache.length if cache.kind == "ring" else 1):
                raise invalid_manifest(f"caches[{i}] has an impossible slack")
            if cache.scales == "channel" and not cache.is_quantized:
                raise invalid_manifest(f"caches[{i}] has scales, but no codes")
        if sum(cache.nbytes for cache in self.caches) > _MOST_CACHE_BYTES:
            raise invalid_manifest("its caches would take more than a terabyte for one sequence")

    def _check_phases(self) -> None:
        for name, phase in self.phases.items():
            if phase.min_tokens < 1 or (phase.max_tokens is not None and phase.max_tokens < phase.min_tokens):
                raise invalid_manifest(f"phase {name!r} serves no number of tokens")
        if "step" not in self.phases or not self.phases["step"].serves(1):
            raise invalid_manifest("it has no phase 'step' that serves single tokens")
        # Where a phase ends, another one must go on.
        for phase in self.phases.values():
            after = None if phase.max_tokens is None else phase.max_tokens + 1
            if (
                after is not None
                and after <= self.max_seq_len
                and not any(p.serves(after) for p in self.phases.values())
            ):
                raise invalid_manifest(f"no phase serves {after} tokens")


def invalid_manifest(why: str) -> LlmcError:
    """Return the refusal of a manifest."""
    return LlmcError(
        "ARTIFACT_INVALID", f"{MANIFEST} can't be read: {why}.", "Compile again: llmc compile MODEL -o DIR"
    )


def _check_format(document: Mapping[str, Any]) -> None:
    found = document["format"]
    if found > FORMAT:
        raise LlmcError(
            "ARTIFACT_NEWER",
            f"The artifact has format {found}; this llmc reads format {FORMAT}.",
            "Update llmc: pip install --upgrade llmc",
        )
    if found < FORMAT:
        raise LlmcError(
            "ARTIFACT_OLDER",
            f"The artifact has format {found}, which llmc 0.1 reads; this llmc reads format {FORMAT}.",
            "Compile it again with this llmc: llmc compile MODEL -o DIR",
        )


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = bool(name) and str(path) == name and not path.is_absolute() and ".." not in path.parts and name != "."
    return plain and "\\" not in name and "\0" not in name and not PureWindowsPath(name).drive
