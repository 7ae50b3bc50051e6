"""Files beside an artifact's graphs, so that the folder is a model to other tools: configs and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import LlmcError
from ..ir.program import Program
from .frontend.sources import ModelSource
from .targets.base import Target


def save_metadata_files(source: ModelSource, program: Program, target: Target, folder: Path) -> None:
    """Write the configs and the tokenizer as Hugging Face tools read them, then the target's own metadata files."""
    if source.config is None:
        return
    source.config.to_json_file(str(folder / "config.json"), use_diff=True)
    _save_generation_config(source, folder)
    try:
        tokenizer = source.tokenizer()
    except LlmcError:
        tokenizer = None  # the artifact takes and gives tokens; a runtime refuses text with a reason
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
        _compact(folder / "tokenizer.json")
    target.write_metadata_files(program, folder)


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
