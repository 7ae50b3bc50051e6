"""The section of the manifest that target "trt" writes and its engine reads.

The neutral artifact is one ONNX graph, whose inputs and outputs are

    input_ids [B, S] int64, starts [B] int64, rows [R] int64, past_key_values.I.key and .value [B, heads, length, width]
    logits [B, R, V] float32, present.I.key and .value, each in the memory of its input

A plan is built from it, with one optimization profile for each phase.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ...artifact.manifest import Manifest, invalid_manifest

GRAPH, DATA = "model.onnx", "model.onnx.data"
PREFILL, DECODE = "prefill", "decode"
PROFILES = (PREFILL, DECODE)
"""The profiles of a plan, in their order. A manifest sorts its keys, so the order of `profiles` there says nothing."""

Library = Literal["tensorrt_rtx", "tensorrt"]
"""The module that builds and runs a plan: TensorRT for RTX, or TensorRT for data centres."""


@dataclass(frozen=True)
class Profile:
    """The shapes that a plan serves with one set of kernels.

    Attributes:
        batch: the most sequences of a call.
        tokens: the most new tokens of a sequence in a call.
    """

    batch: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """A plan: an engine as TensorRT serializes it.

    Attributes:
        version: the version of the library, such as "1.7.1.116". A plan runs with the same one only.
        sms: the compute capabilities that it was built for, such as "8.9".
        record: the file with the record of its build.
    """

    file: str
    library: Library
    version: str
    sms: list[str]
    record: str


@dataclass(frozen=True)
class TensorRtSection:
    """The neutral artifact and the plans built from it.

    Attributes:
        profiles: by name. In a plan, PREFILL is profile 0 and DECODE is profile 1.
    """

    graph: str
    dtype: Literal["fp16", "bf16"]
    profiles: dict[str, Profile]
    plans: list[Plan] = field(default_factory=list)


def read_section(manifest: Manifest) -> TensorRtSection:
    """Read the section and check what the engine relies on.

    Raises:
        LlmcError: ARTIFACT_INVALID.
    """
    section = manifest.read_section(TensorRtSection)
    if set(section.profiles) != {PREFILL, DECODE}:
        raise invalid_manifest(f"its profiles are not {PREFILL} and {DECODE}")
    for name, profile in section.profiles.items():
        if not (1 <= profile.batch <= 1 << 16 and 1 <= profile.tokens <= manifest.max_seq_len):
            raise invalid_manifest(f"profile {name} has an impossible size")
    named = [section.graph, *(file for plan in section.plans for file in (plan.file, plan.record))]
    for name in named:
        if manifest.files and name not in manifest.files:
            raise invalid_manifest(f"the section names {name}, which is not among its files")
    if any(cache.kind != "static" or cache.dtype != section.dtype for cache in manifest.caches):
        raise invalid_manifest(f"its caches are not static ones of {section.dtype}")
    return replace(section, profiles={name: section.profiles[name] for name in PROFILES})
