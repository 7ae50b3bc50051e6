"""Target "trt": TensorRT engines for one or more GPUs, built on any machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...config import CompileConfig
from ..base import Lowered, Target, Watch
from .facts import FACTS
from .options import TensorRtOptions

if TYPE_CHECKING:
    from ....ir.program import Program
    from ....passes.base import Pass
    from ....passes.quantize.quantization_plan import QuantizationPlan


class TensorRtTarget(Target):
    """TensorRT. The graph is a neutral artifact, which onnxruntime can check; engines are built from it."""

    name = "trt"
    summary = "TensorRT on GPUs"
    options = TensorRtOptions
    facts = FACTS
    gate_opener = "llmc.compiler.targets.tensorrt.neutral:open_neutral"

    def finishing_passes(
        self, config: CompileConfig, plan: QuantizationPlan | None, exact_inputs: Collection[str]
    ) -> Mapping[str, Sequence[Pass]]:
        from ....passes.optimize.unmerge_linears import UnmergeLinears
        from .quantized import reads_weights_apart

        return {"step": [UnmergeLinears(reads_weights_apart)]}

    def lower(self, graphs: Mapping[str, Program], folder: Path, config: CompileConfig, watch: Watch) -> Lowered:
        from .write import write_graph

        return write_graph(graphs["step"], folder, self.options_of(config), self.dtype(config), watch)


TARGET = TensorRtTarget()
