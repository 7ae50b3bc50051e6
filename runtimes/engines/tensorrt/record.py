"""The record of a build: what TensorRT made of the graph, as far as its log says. It is a JSON file beside the plan."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ....errors import LlmcError
from ...artifact.decode import DecodeError, decode, encode
from .section import Library


@dataclass(frozen=True)
class AttentionRecord:
    """One attention in one profile.

    Attributes:
        node: the attention's name in the graph.
        kernel: the kernel that computes all of it, or None if several kernels do.
    """

    node: str
    kernel: str | None


@dataclass(frozen=True)
class GemmRecord:
    """One matrix multiplication with a constant weight, in one profile. TensorRT may compute several at once.

    Attributes:
        nodes: the names of its multiplications in the graph.
        requested: the weight's dtype in the graph, such as "int4".
        requested_input: the input's dtype in the graph: "int8" or "fp8" if it is quantized.
        weight: the dtype of the weight that the kernel reads.
        input: the dtype of the input that the kernel reads. "" if the kernel quantizes it.
        shape: inputs and outputs of the weight.
    """

    nodes: list[str]
    requested: str
    requested_input: str
    weight: str
    input: str
    shape: list[int]
    kernel: str


@dataclass(frozen=True)
class CacheRecord:
    """What one profile does with the caches.

    Attributes:
        in_place: the outputs whose kernel also reads them: only the new positions are written.
        copied: the outputs that a kernel writes in full, such as "present.0.key", and that kernel.
        read_in_full: the outputs that a kernel expands into scratch memory for attention, and that kernel.
    """

    in_place: list[str]
    copied: dict[str, str]
    read_in_full: dict[str, str]


@dataclass(frozen=True)
class ProfileRecord:
    """One profile of the plan.

    Attributes:
        kernels: launches in one call.
        activation_bytes: scratch memory of one call on the device.
        unknown_gemms: multiplications of the graph for which no kernel was found.
        expanded: kernels that write a quantized weight out in 16 or 32 bits, with the names of the nodes.
    """

    kernels: int
    activation_bytes: int
    attentions: list[AttentionRecord]
    gemms: list[GemmRecord]
    unknown_gemms: list[str]
    caches: CacheRecord
    expanded: dict[str, list[str]]


@dataclass(frozen=True)
class Fallback:
    """Something that the plan does in a slower way, and the reason.

    Attributes:
        what: the name of a node.
    """

    what: str
    profile: str
    reason: str


@dataclass(frozen=True)
class Problem:
    """A check of the record that failed: the engine is right, but slower or larger than its graph asks for.

    Attributes:
        check: its name: "attention", "cache copied", "cache not in place", "cache read in full", "weight dtype",
            "input dtype", "weight expanded", "gemm unknown" or "weight ratio".
        what: one sentence that names the profile, the node or the kernel.
    """

    check: str
    what: str


@dataclass(frozen=True)
class BuildRecord:
    """The record of a build.

    Attributes:
        sms: the compute capabilities, such as "8.9".
        data_bytes: the weights in the graph's data, as stored.
        weight_bytes: the weights in the engine: all profiles together.
        peak_bytes: memory of the building process at its peak, or None if unknown.
        seconds: duration of the build.
        warnings: what the library warned of, once each.
        problems: the checks of this record that failed.
    """

    library: Library
    version: str
    sms: list[str]
    profiles: dict[str, ProfileRecord]
    fallbacks: list[Fallback]
    data_bytes: int
    weight_bytes: int
    plan_bytes: int
    peak_bytes: int | None
    seconds: float
    warnings: list[str]
    problems: list[Problem] = field(default_factory=list)

    @property
    def weight_ratio(self) -> float:
        """Engine weights over stored weights; more than 1 if profiles don't share them or a kernel pads them."""
        return self.weight_bytes / max(self.data_bytes, 1)


def write_record(record: BuildRecord, path: Path) -> None:
    """Write a record as JSON."""
    path.write_text(json.dumps(encode(record), indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> BuildRecord:
    """Read a record.

    Raises:
        LlmcError: ARTIFACT_INVALID.
    """
    try:
        return decode(BuildRecord, json.loads(path.read_text(encoding="utf-8")), path.name)
    except (OSError, ValueError, DecodeError, RecursionError) as error:
        reason = error if isinstance(error, DecodeError) else type(error).__name__
        what = f"The record of a build can't be read: {reason}."
        raise LlmcError("ARTIFACT_INVALID", what, "Compile the model again.") from None
