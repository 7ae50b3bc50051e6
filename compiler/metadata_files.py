"""What stands in an artifact beside its graphs: the manifest, the configs, the tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import LlmcError
from ..ir.program import Program, layer_of
from ..runtimes.artifact.hashing import sha256_all
from ..runtimes.artifact.manifest import FORMAT, GraphSpec, Manifest, ModelSpec
from .compress.pruning import Pruning
from .config import CompileConfig
from .frontend.sources import ModelSource
from .targets.ort.genai import genai_config
from .targets.ort.write import cache_specs

# Older releases lack kernels of the tables; a later major release may change what an op means.
_REQUIRES = {"onnxruntime": ">=1.30,<2"}


def write_json(path: Path, document: Any) -> None:
    """Canonical JSON: the same content, the same bytes."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def save_companions(source: ModelSource, program: Program, folder: Path) -> None:
    """Write configs and tokenizer, so that the folder is a model to every tool that reads such folders."""
    if source.config is None:
        return
    source.config.to_json_file(str(folder / "config.json"), use_diff=True)
    _save_generation_config(source, folder)
    try:
        tokenizer = source.tokenizer()
    except LlmcError:
        tokenizer = None  # tokens in, tokens out: a runtime says so where text is asked for
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
        _compact(folder / "tokenizer.json")
    if config := genai_config(program, folder):
        write_json(folder / "genai_config.json", config)


def describe(
    source: ModelSource,
    module: nn.Module,
    program: Program,
    config: CompileConfig,
    quantization: dict[str, Any] | None,
    pruning: Pruning,
    graphs: dict[str, GraphSpec],
    known: str,
) -> Manifest:
    """The manifest, all but its files; `known` is the model's identity."""
    return Manifest(
        format=FORMAT,
        target=config.target,
        model=ModelSpec(
            name=Path(source.name).name,
            type=getattr(source.config, "model_type", "") or type(module).__name__,
            identity=known,
            vocab_size=int(program.output.meta["val"].shape[-1]),
            layers=len({layer_of(node) for node in program.nodes} - {"", *pruning.dropped}),
            parameters=sum(p.numel() for p in module.parameters()),
        ),
        max_seq_len=program.max_seq_len,
        graphs=graphs,
        caches=cache_specs(program),
        quantization=quantization,
        built_with={name: metadata.version(name) for name in ("torch", "transformers", "onnx")} | {"llmc": __version__},
        requires=_REQUIRES,
        pruning=pruning.as_dict(),
    )


def identity(source: ModelSource, module: nn.Module) -> str:
    """What was compiled, by content: the hub's commit, or a hash of the files or the tensors."""
    if source.files:
        if commit := re.search(r"/snapshots/([0-9a-f]{40})/", source.files[0].as_posix()):
            return f"commit:{commit.group(1)}"
        digests = zip(source.files, sha256_all(source.files), strict=True)
        return "sha256:" + _combined([f"{path.name} {digest}" for path, digest in digests])
    tensors = sorted(source.weights(module).items())
    return "sha256:" + _combined([f"{name} {_digest(weight.evaluate())}" for name, weight in tensors])


def _combined(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _compact(path: Path) -> None:
    """Take the spaces out of a large JSON file, a third of it."""
    if path.exists():
        path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))


def _save_generation_config(source: ModelSource, folder: Path) -> None:
    from transformers import GenerationConfig

    given = [path.parent / "generation_config.json" for path in source.files[:1]]
    if given and given[0].exists():
        shutil.copyfile(given[0], folder / "generation_config.json")
    else:
        GenerationConfig.from_model_config(source.config).save_pretrained(str(folder))  # type: ignore[arg-type]
