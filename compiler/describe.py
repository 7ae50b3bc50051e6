"""The manifest of what was compiled."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..ir.caches import Cache
from ..ir.nodes import value_of
from ..ir.program import Program, layer_of
from ..kernels.ops.quantized import CACHE_CODES
from ..runtimes.artifact.decode import encode
from ..runtimes.artifact.manifest import FORMAT, CacheSpec, DtypeName, Manifest, ModelSpec, QuantizationSpec
from ..version import __version__
from .compress.pruning import Pruning
from .frontend.sources import ModelSource
from .targets.base import Lowered, Target

_CACHE_DTYPES: dict[torch.dtype, Literal["fp32", "fp16", "bf16", "int8", "fp8"]] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    CACHE_CODES["int8"]: "int8",
    CACHE_CODES["fp8"]: "fp8",
}


def describe(
    source: ModelSource,
    module: nn.Module,
    program: Program,
    target: Target,
    lowered: Lowered,
    quantization: QuantizationSpec | None,
    pruning: Pruning,
    identity: str,
    dtype: DtypeName = "fp32",
) -> Manifest:
    """Return the manifest without its files, for a cached program and what a target made of it."""
    built_with = ("torch", "transformers", *target.facts.packages["compile"])
    return Manifest(
        format=FORMAT,
        target=target.name,
        model=ModelSpec(
            name=Path(source.name).name,
            type=getattr(source.config, "model_type", "") or type(module).__name__,
            identity=identity,
            vocab_size=int(value_of(program.output).shape[-1]),
            layers=len({layer_of(node) for node in program.nodes} - {"", *pruning.dropped}),
            parameters=sum(p.numel() for p in module.parameters()),
        ),
        dtype=dtype,
        max_seq_len=program.max_seq_len,
        phases=dict(lowered.phases),
        caches=[cache_spec(cache) for cache in program.caches],
        quantization=quantization,
        pruning=pruning.spec(),
        section=encode(lowered.section),
        built_with={name: metadata.version(name) for name in built_with} | {"llmc": __version__},
        requires=dict(lowered.requires),
    )


def cache_spec(cache: Cache) -> CacheSpec:
    """Return the manifest's account of a cache."""
    return CacheSpec(
        kind="ring" if cache.ring else "static",
        heads=cache.heads,
        key_dim=cache.key_dim,
        value_dim=cache.value_dim,
        length=cache.length,
        dtype=_CACHE_DTYPES[cache.dtype],
        slack=cache.slack,
        scales="channel" if cache.is_quantized and cache.key_scales is None else "token",
    )
