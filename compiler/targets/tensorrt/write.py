"""From a cached program to the neutral artifact: one ONNX graph and its weights."""

from __future__ import annotations

from pathlib import Path

from ....ir.program import Program
from ....runtimes.artifact.manifest import Phase
from ....runtimes.engines.tensorrt.section import DATA, DECODE, GRAPH, PREFILL, Profile, TensorRtSection
from ..base import Lowered, Watch
from ..onnx.check import check_onnx
from ..onnx.external import ExternalData
from .lowering import TensorRtLowering
from .options import TensorRtOptions


def write_graph(program: Program, folder: Path, options: TensorRtOptions, dtype: str, watch: Watch) -> Lowered:
    """Write the graph and one data file.

    Args:
        watch: called with each weight's name before it is computed.
    """
    with ExternalData(folder / DATA, watch) as data:
        lowering = TensorRtLowering(program, data)
        lowering.run()
        lowering.save(folder / GRAPH)
    check_onnx(folder / GRAPH)
    tokens = min(options.max_prompt_tokens, program.max_seq_len)
    profiles = {PREFILL: Profile(1, tokens), DECODE: Profile(options.max_batch_size, 1)}
    section = TensorRtSection(GRAPH, dtype, profiles)  # type: ignore[arg-type]
    return Lowered({"step": Phase(1)}, section, {})
