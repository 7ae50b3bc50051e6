"""Hold the network of a compiled model, parsed and polished, against its neutral artifact in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from interpreting import FLOATS, TOLERANCES

from llmc.compiler.targets.onnx.rounded import rounded_model
from llmc.compiler.targets.tensorrt.interpreter.constants import collect_constants
from llmc.compiler.targets.tensorrt.interpreter.run import run
from llmc.compiler.targets.tensorrt.network import Network, parse
from llmc.compiler.targets.tensorrt.polish import polish
from llmc.runtimes.engines.tensorrt.library import find_library

# A prompt of two sequences, then steps at positions of their own.
CALLS = (((0, 0), 6), ((6, 3), 1), ((7, 4), 2))


def _polished(path: Path) -> Network:
    library = find_library()
    network = parse(library, library.module.Logger(library.module.Logger.ERROR), path)
    polish(network)
    return network


def network_error(path: Path, dtype: str) -> float:
    """Return the largest error of the logits and caches of all calls, in roundings to the dtype of the largest number.

    ONNX Runtime computes in float32 and rounds each result to `dtype`, as the network does.
    """
    network, constants = _polished(path), collect_constants(path)
    model = rounded_model(onnx.load(path))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = {
        _present(tensor.name): np.zeros((2, *tensor.shape[1:]), np.float32)
        for tensor in session.get_inputs()
        if tensor.name.startswith("past")
    }
    actual = {name: value.astype(FLOATS[dtype]) for name, value in expected.items()}
    worst = 0.0
    for starts, tokens in CALLS:
        ids = np.random.default_rng(tokens).integers(3, 60, (2, tokens))
        feeds = {"input_ids": ids, "starts": np.array(starts), "rows": np.arange(tokens)}
        actual = run(network.definition, feeds | _pasts(actual), constants)
        expected = dict(zip(names, session.run(names, feeds | _pasts(expected)), strict=True))
        for name, value in expected.items():
            worst = max(worst, float(np.abs(actual[name].astype(np.float32) - value).max() / np.abs(value).max()))
    return worst / TOLERANCES[dtype]


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


def _pasts(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs that are the next call's inputs."""
    return {n.replace("present", "past_key_values"): value for n, value in values.items() if n.startswith("present")}
