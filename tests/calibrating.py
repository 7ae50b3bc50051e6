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
from llmc.ir.program import Program
from llmc.ir.stages import Stage

_HOME, _NUMBERS = tempfile.TemporaryDirectory(prefix="calibrating-"), itertools.count()


def new_cache() -> CalibrationCache:
    """Return an empty cache whose folder lasts as long as the tests."""
    return CalibrationCache(Path(_HOME.name) / str(next(_NUMBERS)))


@functools.cache
def uneven_program() -> Program:
    """A tiny model whose channels differ as those of trained models do; callers change a copy only."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight *= torch.logspace(-1, 1, layer.input_layernorm.weight.numel())
            layer.post_attention_layernorm.weight *= torch.logspace(1, -1, layer.input_layernorm.weight.numel())
    return llmc.capture(model, until=Stage.OPTIMIZED)
