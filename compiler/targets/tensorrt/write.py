"""From a cached program to the neutral artifact: one ONNX graph and its weights."""

from __future__ import annotations

from pathlib import Path

from ....ir.program import Program
from ....runtimes.artifact.manifest import DtypeName, Phase
from ....runtimes.engines.tensorrt.section import DATA, GRAPH, TensorRtSection
from ..base import Lowered, Watch
from ..onnx.check import check_onnx
from ..onnx.external import ExternalData
from .engines import profiles_of
from .lowering import TensorRtLowering
from .options import TensorRtOptions


def write_graph(program: Program, folder: Path, options: TensorRtOptions, dtype: DtypeName, watch: Watch) -> Lowered:
    """Write the graph and one data file.

    Args:
        watch: called with each weight's name before it is computed.
    """
    with ExternalData(folder / DATA, watch) as data:
        lowering = TensorRtLowering(program, data)
        lowering.run()
        lowering.save(folder / GRAPH)
    check_onnx(folder / GRAPH)
    assert dtype in ("fp16", "bf16")
    section = TensorRtSection(GRAPH, dtype, profiles_of(options, program.max_seq_len))
    return Lowered({"step": Phase(1)}, section, {})
