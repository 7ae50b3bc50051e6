"""Target "trt": TensorRT engines for one or more GPUs, built on any machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ....errors import LlmcError
from ...config import CompileConfig
from ..base import Lowered, PhaseWatch, Table, Target, Watch
from .facts import FACTS
from .options import TensorRtOptions

if TYPE_CHECKING:
    from ....ir.program import Program
    from ....passes.base import Pass
    from ....passes.quantize.quantization_plan import QuantizationPlan
    from ....runtimes.artifact.manifest import Manifest


class TensorRtTarget(Target):
    """TensorRT. The graph is a neutral artifact, which onnxruntime can check; engines are built from it."""

    name = "trt"
    summary = "TensorRT on GPUs"
    options = TensorRtOptions
    facts = FACTS
    finalizes = True
    gate_opener = "llmc.compiler.targets.tensorrt.neutral:open_neutral"

    def check(self, config: CompileConfig) -> None:
        super().check(config)
        if (own := self.options_of(config)).engine:
            from .machine import check_machine

            check_machine(own, [self.dtype(config), *filter(None, [config.quantize])])

    def missing(self, step: Literal["compile", "run"]) -> str | None:
        from ....runtimes.cuda.libcuda import open_driver
        from ....runtimes.engines.tensorrt.library import find_library

        try:
            if step == "run":
                open_driver()
            find_library()
        except LlmcError as error:
            return error.what.rstrip(".")
        return None

    def check_program(self, program: Program, config: CompileConfig) -> None:
        from .supported import check_attentions

        check_attentions(program)

    def finishing_passes(
        self, config: CompileConfig, plan: QuantizationPlan | None, exact_inputs: Collection[str]
    ) -> Mapping[str, Sequence[Pass]]:
        from ....passes.optimize.unmerge_linears import UnmergeLinears
        from .quantized import reads_weights_apart

        return {"step": [UnmergeLinears(reads_weights_apart)]}

    def lower(self, graphs: Mapping[str, Program], folder: Path, config: CompileConfig, watch: Watch) -> Lowered:
        from .write import write_graph

        return write_graph(graphs["step"], folder, self.options_of(config), self.dtype(config), watch)

    def finalize(self, folder: Path, manifest: Manifest, options: TensorRtOptions, watch: PhaseWatch) -> Manifest:
        from .engines import build_engines

        return build_engines(folder, manifest, options, watch) if options.engine else manifest

    def tables(self, folder: Path, manifest: Manifest) -> Sequence[Table]:
        from .tables import engine_tables

        return engine_tables(folder, manifest)

    def plan_tables(self, program: Program) -> Sequence[Table]:
        from .plan_tables import build_tables

        return build_tables(program)

    def remarks(self, folder: Path, manifest: Manifest) -> Sequence[str]:
        from .tables import engine_remarks

        return engine_remarks(folder, manifest)


TARGET = TensorRtTarget()
