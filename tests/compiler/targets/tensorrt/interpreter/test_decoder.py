"""A whole decoder: a prompt and steps of two sequences, and mistakes that must be seen."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from interpreted_decoder import Decoder, Fault, decode
from interpreting import BFLOAT16, FLOATS, TOLERANCES, Network, run_in_onnxruntime

from llmc.compiler.targets.tensorrt.interpreter.run import run

pytest.importorskip("tensorrt_rtx")

# Two layers of a dozen roundings each, whose errors are of the largest logits and partly cancel.
ROUNDINGS = 8


def interpreted(dtype: str, fault: Fault | None = None) -> list[np.ndarray]:
    decoder = Decoder(FLOATS[dtype], fault)
    net = Network()
    network = net.parse(decoder.model())
    constants = {name: value for name, value in decoder.constants.items() if value.dtype == BFLOAT16}
    return decode(lambda feeds: run(network, feeds, constants), FLOATS[dtype])


@cache
def expected(dtype: str) -> tuple[np.ndarray, ...]:
    """Return ONNX Runtime's logits; of bf16 numbers in float32, as it has no kernels for bf16."""
    computed = np.dtype(np.float32) if dtype == "bf16" else FLOATS[dtype]
    model = Decoder(computed, values=FLOATS[dtype]).model()
    return tuple(decode(lambda feeds: run_in_onnxruntime(model, feeds), computed))


def errors(actual: list[np.ndarray], dtype: str) -> list[float]:
    """Return the largest error of each call, relative to the largest logit and to the dtype's tolerance."""
    return [
        float(np.abs(a - b).max() / np.abs(b).max() / TOLERANCES[dtype])
        for a, b in zip(actual, expected(dtype), strict=True)
    ]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_prompt_and_steps(dtype: str) -> None:
    found = errors(interpreted(dtype), dtype)
    assert max(found) < ROUNDINGS, found


@pytest.mark.parametrize(
    "fault",
    [
        Fault(scale=1.25),
        Fault(swapped=True),
        Fault(mask=1),
        Fault(mask=-1),
        Fault(slot=1),
    ],
    ids=["scale", "swapped", "mask late", "mask early", "slot"],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_mistakes_are_seen(fault: Fault, dtype: str) -> None:
    found = errors(interpreted(dtype, fault), dtype)
    assert all(not error < 2 * ROUNDINGS for error in found), found
