"""Target "ort": ONNX graphs for ONNX Runtime on CPUs, and on GPUs by its CUDA provider."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import LlmcError
from ...config import CompileConfig
from ...options import invalid
from ..base import InputExemption, KernelFacts, Lowered, Target, Watch
from .facts import CUDA_FACTS, FACTS, HEAD_MULTIPLE, INPUT_EXEMPTION, LARGEST_HEAD_ON_CUDA
from .options import OrtOptions

if TYPE_CHECKING:
    from ....ir.program import Program
    from ....passes.base import Pass
    from ....passes.quantize.quantization_plan import Choice, QuantizationPlan
    from ....runtimes.artifact.manifest import Manifest
    from ....runtimes.engines.base import LayerEngine

_ROUNDED = "llmc.compiler.targets.ort.rounded:open_rounded"


class OrtTarget(Target):
    """ONNX Runtime. A step graph serves any number of tokens; where integer kernels pay, prompts get a second graph."""

    name = "ort"
    summary = "ONNX Runtime on CPUs, or on GPUs with --device cuda"
    options = OrtOptions
    facts = FACTS

    def facts_for(self, config: CompileConfig) -> KernelFacts:
        return CUDA_FACTS if self._is_cuda(config) else FACTS

    def gate_opener_for(self, manifest: Manifest) -> str | None:
        from ....runtimes.engines.ort.section import OrtSection

        # A manifest that is being written lacks the files that a complete section names.
        return _ROUNDED if manifest.read_section(OrtSection).device == "cuda" else None

    def missing_for(self, manifest: Manifest) -> str | None:
        from ....runtimes.engines.ort.device import Cuda

        try:
            Cuda().close()
        except LlmcError as error:
            return error.what.rstrip(".")
        return None

    def check(self, config: CompileConfig) -> None:
        super().check(config)
        own = self.options_of(config)
        if not own.round_prompts and not self._quantizes_prompts(config, asked=True):
            raise invalid(
                "round_prompts is false", "Leave it out: only int4 on CPUs, with `ops` contrib, quantizes inputs."
            )

    def has_constant_cache_scales(self, config: CompileConfig) -> bool:
        # The fused kernel dequantizes on the way, but it has no scales of single tokens.
        return config.cache_codes == "int8" and self.options_of(config).ops == "contrib"

    def input_exemption(self, config: CompileConfig) -> InputExemption | None:
        return INPUT_EXEMPTION if self._quantizes_prompts(config) else None

    def input_group(self, config: CompileConfig, choice: Choice) -> int | None:
        assert choice.grid is not None
        if self._is_cuda(config):
            return super().input_group(config, choice)
        if choice.grid.activation == "int8" or (self._quantizes_prompts(config) and not choice.is_wide):
            return 0
        # The kernels that expand codes quantize inputs on their way, group by group.
        return choice.group_size if choice.grid.scheme in ("int8", "int4") else None

    def finishing_passes(
        self, config: CompileConfig, plan: QuantizationPlan | None, exact_inputs: Collection[str]
    ) -> Mapping[str, Sequence[Pass]]:
        from ....passes.cache.fuse_attention import FuseAttention
        from ....passes.optimize.unmerge_linears import UnmergeLinears
        from ....passes.quantize.quantize_activations import QuantizeActivations, QuantizeInKernels

        if self._is_cuda(config):
            return {"step": [FuseAttention(HEAD_MULTIPLE, LARGEST_HEAD_ON_CUDA)]}
        is_contrib = self.options_of(config).ops == "contrib"
        fused: list[Pass] = [FuseAttention(HEAD_MULTIPLE)] if is_contrib else []
        quantizes_prompts = self._quantizes_prompts(config)
        quantizes_by_token = is_contrib and plan is not None and plan.quantizes_inputs_by_token
        if plan is None or not (quantizes_prompts or quantizes_by_token):
            return {"step": fused}
        # Few tokens wait for weights: the kernels that expand codes are faster. Many wait for arithmetic.
        quantizing: list[Pass] = [QuantizeActivations(exact_inputs)] if quantizes_prompts else []
        return {"step": [*fused, QuantizeInKernels()], "prefill": [*fused, *quantizing, UnmergeLinears()]}

    def lower(self, graphs: Mapping[str, Program], folder: Path, config: CompileConfig, watch: Watch) -> Lowered:
        from .write import write_graphs

        own = self.options_of(config)
        return write_graphs(graphs, folder, "cuda" if self._is_cuda(config) else own.ops, watch, own.device)

    def write_metadata_files(self, program: Program, folder: Path) -> None:
        from ....runtimes.artifact.canonical import write_json
        from .genai import genai_config

        if config := genai_config(program, folder):
            write_json(folder / "genai_config.json", config)

    def open_layers(self, folder: Path, *, threads: int | None = None) -> LayerEngine:
        from ....runtimes.artifact.open import open_artifact
        from ....runtimes.engines.ort.layers import LayerOutputEngine
        from .layer_outputs import add_layer_outputs

        manifest = open_artifact(folder)
        if self.gate_opener_for(manifest) is not None:
            return super().open_layers(folder, threads=threads)
        return LayerOutputEngine(folder, manifest, add_layer_outputs(folder, manifest), threads=threads)

    def _is_cuda(self, config: CompileConfig) -> bool:
        return bool(self.options_of(config).device == "cuda")

    def _quantizes_prompts(self, config: CompileConfig, asked: bool | None = None) -> bool:
        """Return True if prompts run on integer kernels although the scheme keeps inputs exact.

        Args:
            asked: `round_prompts`; None: that of the config.
        """
        own = self.options_of(config)
        wanted = own.round_prompts if asked is None else asked
        return wanted and own.device == "cpu" and own.ops == "contrib" and config.quantize == "int4"


TARGET = OrtTarget()
