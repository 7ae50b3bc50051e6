"""The networks that are built from compiled models, parsed and polished, held against the neutral artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowered_networks import network_error
from zoo.tiny import tiny_model

import llmc
from llmc.runtimes.engines.tensorrt.section import GRAPH

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("model_type", "dtype", "scheme", "tolerance"),
    [
        ("llama", "fp16", None, 6),
        ("gpt2", "bf16", "int8", 6),
        ("mixtral", "bf16", "int4", 8),
        # A code of 8 bits is one of 127 steps, and may be the next one.
        ("llama", "fp16", "w8a8", 100),
    ],
)
def test_a_compiled_model(model_type: str, dtype: str, scheme: str | None, tolerance: float, tmp_path: Path) -> None:
    """The tolerance is in roundings to the dtype."""
    with torch.random.fork_rng(devices=[]):
        llmc.compile(
            tiny_model(model_type), tmp_path / "model", target="trt", dtype=dtype, quantize=scheme, verify=False
        )
    assert network_error(tmp_path / "model" / GRAPH, dtype) < tolerance
