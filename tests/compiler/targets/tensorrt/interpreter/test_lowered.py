"""The networks that are built from compiled models, parsed and polished, held against the neutral artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from interpreting import FLOATS, TOLERANCES
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.targets.onnx.rounded import rounded_model
from llmc.compiler.targets.tensorrt.interpreter.constants import collect_constants
from llmc.compiler.targets.tensorrt.interpreter.run import run
from llmc.compiler.targets.tensorrt.network import Network, parse
from llmc.compiler.targets.tensorrt.polish import polish
from llmc.runtimes.engines.tensorrt.library import find_library
from llmc.runtimes.engines.tensorrt.section import GRAPH

pytest.importorskip("tensorrt_rtx")

# A prompt of two sequences, then steps at positions of their own.
CALLS = (((0, 0), 6), ((6, 3), 1), ((7, 4), 2))


def polished(path: Path) -> Network:
    library = find_library()
    network = parse(library, library.module.Logger(library.module.Logger.ERROR), path)
    polish(network)
    return network


def error(path: Path, dtype: str) -> float:
    """Return the largest error of the logits and caches of all calls, relative to the largest number of each.

    ONNX Runtime computes in float32 and rounds each result to `dtype`, as the network does.
    """
    network, constants = polished(path), collect_constants(path)
    model = rounded_model(onnx.load(path))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = {
        present(tensor.name): np.zeros((2, *tensor.shape[1:]), np.float32)
        for tensor in session.get_inputs()
        if tensor.name.startswith("past")
    }
    actual = {name: value.astype(FLOATS[dtype]) for name, value in expected.items()}
    worst = 0.0
    for starts, tokens in CALLS:
        ids = np.random.default_rng(tokens).integers(3, 60, (2, tokens))
        feeds = {"input_ids": ids, "starts": np.array(starts), "rows": np.arange(tokens)}
        actual = run(network.definition, feeds | pasts(actual), constants)
        expected = dict(zip(names, session.run(names, feeds | pasts(expected)), strict=True))
        for name, value in expected.items():
            worst = max(worst, float(np.abs(actual[name].astype(np.float32) - value).max() / np.abs(value).max()))
    return worst


def present(name: str) -> str:
    return name.replace("past_key_values", "present")


def pasts(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs that are the next call's inputs."""
    return {n.replace("present", "past_key_values"): value for n, value in values.items() if n.startswith("present")}


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
    found = error(tmp_path / "model" / GRAPH, dtype) / TOLERANCES[dtype]
    assert found < tolerance
