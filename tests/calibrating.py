"""Helpers for tests of calibration: a model whose channels differ, and caches for results."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import torch
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.compress.cache import CalibrationCache
from llmc.compiler.config import CompileConfig
from llmc.compiler.targets.registry import find_target
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.passes.quantize.quantization_plan import Choice

_HOME, _NUMBERS = tempfile.TemporaryDirectory(prefix="calibrating-"), itertools.count()


def new_cache() -> CalibrationCache:
    """Return an empty cache whose folder lasts as long as the tests."""
    return CalibrationCache(Path(_HOME.name) / str(next(_NUMBERS)))


def input_group(choice: Choice) -> int | None:
    """Return the groups in which target "ort" quantizes inputs if prompts have no kernels of their own."""
    return find_target("ort").input_group(CompileConfig(), choice)


@functools.cache
def uneven_program() -> Program:
    """Return a tiny model whose channels differ as in trained models. Callers must copy it to change it."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight *= torch.logspace(-1, 1, layer.input_layernorm.weight.numel())
            layer.post_attention_layernorm.weight *= torch.logspace(1, -1, layer.input_layernorm.weight.numel())
    return llmc.capture(model, until=Stage.OPTIMIZED)
