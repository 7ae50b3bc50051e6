"""Passes that target "ort" adds for a graph, without the fused attention."""

from __future__ import annotations

from llmc.passes.base import Pass
from llmc.passes.optimize.unmerge_linears import UnmergeLinears
from llmc.passes.quantize.quantize_activations import QuantizeActivations, QuantizeInKernels


def step_passes() -> list[Pass]:
    """Return the passes of the step graph."""
    return [QuantizeInKernels()]


def prefill_passes() -> list[Pass]:
    """Return the passes of the prefill graph."""
    return [QuantizeActivations(), UnmergeLinears()]
