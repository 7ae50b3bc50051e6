"""From an optimized program to the files of an artifact, and to the gate's verdict on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..ir.caches import ChannelScales
from ..ir.program import Program
from ..passes.base import Pass
from ..passes.pipeline import caching_passes
from ..passes.runner import Runner
from ..runtimes.artifact.canonical import write_json
from ..runtimes.artifact.manifest import Manifest, QuantizationSpec, Verified
from ..runtimes.artifact.write import ArtifactWriter
from ..runtimes.engines.selfcheck import limits_key
from ..runtimes.measure.texts import Text
from .compress.cache_scales import cache_scales, sample_tokens
from .compress.dequantized import describe_dequantized
from .compress.pruning import Pruning
from .compress.quantization import Quantization
from .config import CompileConfig
from .describe import describe
from .frontend.from_source import program_of
from .frontend.sources import ModelSource
from .gate.bisect import Recipe, find_faulty_pass
from .gate.quantized_cache import with_quantized_cache
from .gate.reference import make_reference
from .gate.verify import check_in_new_process, gate_failed
from .metadata_files import save_metadata_files
from .phases import Phases
from .targets.base import Target


@dataclass(frozen=True)
class Written:
    """An artifact in its temporary folder.

    Attributes:
        program: the cached program that the graphs were made from.
        changed: the program with quantized or pruned weights, keys and values, but without caches; None if it is the
            model's.
        recipe: the passes that led there, so that the gate can find the one at fault.
        manifest: everything but the list of files.
    """

    program: Program
    changed: Program | None
    recipe: Recipe
    precision: str
    manifest: Manifest


@dataclass
class Build:
    """Writes artifacts of one optimized program; each one replaces the one before.

    Attributes:
        module: the model in float32, which the gate compares with.
        program: computes in float32 until `compute_in`.
        text: the calibration text, if something is calibrated.
        runner: has run the passes so far; each artifact continues with the fuel that is left.
        last_runner: has run the passes of the artifact that was written last.
    """

    source: ModelSource
    module: nn.Module
    program: Program
    config: CompileConfig
    target: Target
    text: Text | None
    writer: ArtifactWriter
    phases: Phases
    runner: Runner
    identity: str
    pruning: Pruning = field(default_factory=Pruning)
    last_runner: Runner = field(init=False)
    dtype: torch.dtype = torch.float32

    def compute_in(self, dtype: torch.dtype, runner: Runner) -> None:
        """Replace the program by one of the same model that computes in another dtype.

        Args:
            runner: runs the passes of this program and of its artifacts.
        """
        self.dtype, self.runner = dtype, runner
        with self.phases("capture"):
            self.program = self._capture()
        with self.phases("passes"):
            runner.run(self.program, [*self.pruning.optimizing, *self.pruning.passes])

    def _capture(self) -> Program:
        module = self.module if self.dtype is torch.float32 else self.source.build(self.dtype)
        return program_of(self.source, module, self.config.max_seq_len)

    def write(self, quantization: Quantization | None) -> Written:
        """Write an artifact with the weights quantized as decided."""
        config, codes = self.config, self.config.cache_codes
        finishing = self._finishing(quantization)
        program, self.last_runner = self.program.copy(), self.runner.branch()
        with self.phases("passes"):
            quantizing = quantization.passes if quantization else []
            self.last_runner.run(program, quantizing)
            changed = program.copy() if quantization or self.pruning or codes else None
        scales = self._cache_scales(program)
        ring = self.target.cache_kind(config) == "ring"
        caching = caching_passes(ring=ring, cache_codes=codes, slack=config.spec_tokens, cache_scales=scales)
        with self.phases("passes"):
            self.last_runner.run(program, caching)
            graphs = {
                name: self.last_runner.run(program.copy(), passes, graph=name) for name, passes in finishing.items()
            }
        with self.phases("write"):
            names = iter(range(len(program.weights)))
            lowered = self.target.lower(
                graphs,
                self.writer.folder,
                config,
                lambda name: self.phases.watch("write", next(names, 0), len(program.weights)),
            )
            save_metadata_files(self.source, program, self.target, self.writer.folder)
            manifest = describe(
                self.source, self.module, program, self.target, lowered, self._spec(quantization), self.pruning,
                self.identity, self.target.dtype(config),
            )  # fmt: skip
        if changed is not None and codes is not None:
            changed = with_quantized_cache(changed, codes, program)
        common = [*self.pruning.optimizing, *self.pruning.passes, *quantizing, *caching]
        precision = quantization.precision if quantization else self.target.dtype(config)
        return Written(program, changed, Recipe(common, finishing), precision, manifest)

    def _cache_scales(self, program: Program) -> list[ChannelScales]:
        """Return the constant scales of keys and values; none if each token has its own."""
        if self.text is None or not self.target.has_constant_cache_scales(self.config):
            return []
        tokens = sample_tokens(self.source, self.text, self.config, program.max_seq_len)
        if tokens is None:
            return []
        with self.phases("calibrate caches"):
            return cache_scales(program, tokens, lambda *done: self.phases.watch("calibrate caches", *done))

    def _spec(self, quantization: Quantization | None) -> QuantizationSpec | None:
        if quantization is not None:
            return quantization.spec()
        return describe_dequantized(
            self.program, self.target.facts_for(self.config).stored, self.target.dtype(self.config)
        )

    def _finishing(self, quantization: Quantization | None) -> Mapping[str, list[Pass]]:
        plan = quantization.final_plan if quantization else None
        exact = quantization.exact_inputs if quantization else frozenset()
        return {name: list(passes) for name, passes in self.target.finishing_passes(self.config, plan, exact).items()}

    def check(self, written: Written) -> Manifest:
        """Run the gate and leave what it measured beside the artifact.

        Returns:
            The manifest, which says where the artifact was verified.

        Raises:
            CheckFailedError: GATE_FAILED.
        """
        key = limits_key(written.precision, bool(self.pruning), self.config.cache_codes)
        with self.phases("reference"):
            reference = make_reference(
                self.source, self.module, written.program, precision=key, rounded=written.changed
            )
            reference.save(self.writer.folder)
        opener = self.target.gate_opener_for(written.manifest)
        verified = Verified() if opener is None else Verified(here="graph", on_device="gate")
        manifest = replace(written.manifest, verified=verified)
        with self.phases("gate"):
            self.writer.seal(manifest)
            verdict = check_in_new_process(self.writer.folder, opener)
            self.phases.peak["gate"] = max(self.phases.peak.get("gate", 0), verdict.peak_rss_bytes)
        if not verdict.report.passed:
            with self.phases("bisect"):
                found = find_faulty_pass(
                    self._capture(),
                    written.recipe,
                    torch.from_numpy(reference.tokens),
                    key,
                    self.target.dtype(self.config),
                )
            raise gate_failed(verdict.report, found)
        write_json(self.writer.folder / "verify.json", verdict.report.as_dict())
        return manifest
