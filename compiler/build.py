"""From an optimized program to the files of an artifact, and whether they are the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ir.program import Program
from ..passes.base import Pass, PassResult
from ..passes.pipeline import Dump, few_rows_passes, many_rows_passes, run_passes
from ..passes.quantize.quantize import Quantize
from ..runtimes.artifact.manifest import Manifest
from ..runtimes.artifact.write import ArtifactWriter
from ..runtimes.measure.selfcheck import LIMITS, limits_row
from .compress.dequantized import describe_dequantized
from .compress.pruning import Pruning
from .compress.quantization import Quantization
from .config import CompileConfig
from .frontend.sources import ModelSource
from .gate.bisect import find_faulty_pass
from .gate.rounded_cache import with_rounded_keys
from .gate.verify import check_apart, gate_failed, make_reference
from .metadata_files import describe, identity, save_companions, write_json
from .phases import Phases
from .targets.ort.write import build_onnx


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        program: as it was lowered.
        rounded: the program over rounded or pruned weights, keys and values, without a cache; None where it is the
            model's.
        manifest: all but its files.
    """

    program: Program
    rounded: Program | None
    rounding: Quantization | None
    manifest: Manifest


@dataclass
class Build:
    """Writes artifacts of one optimized program; whoever writes a second one replaces the first."""

    source: ModelSource
    module: nn.Module
    program: Program
    config: CompileConfig
    writer: ArtifactWriter
    phases: Phases
    dump: Dump | None = None
    pruning: Pruning = field(default_factory=Pruning)
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        self.identity = identity(self.source, self.module)

    def write(self, rounding: Quantization | None) -> Written:
        """Write an artifact of the program with these weights rounded."""
        codes = self.config.cache_codes
        program, rounded = self.program.copy(), [self.program] if self.pruning or codes else []

        def keep_rounded(subject: Pass, result: PassResult) -> None:
            if isinstance(subject, Quantize):
                rounded.append(program.copy())

        with self.phases("passes"):
            passes = self.config.engine_passes(rounding.passes if rounding else [])
            run_passes(program, passes, dump=self.dump, watch=keep_rounded)
        with self.phases("write"):
            names = iter(range(len(program.weights)))
            graphs = build_onnx(
                program,
                self.writer.folder,
                ops=self.config.ops,
                **self._by_rows(rounding),
                watch=lambda name: self.phases.watch("write", next(names, 0), len(program.weights)),
            )
            save_companions(self.source, program, self.writer.folder)
            quantization = rounding.as_dict() if rounding else describe_dequantized(self.program, self.config.dtype)
            manifest = describe(
                self.source, self.module, program, self.config, quantization, self.pruning, graphs, self.identity
            )
        held_to = rounded[-1] if rounded else None
        if held_to is not None and codes is not None:
            held_to = with_rounded_keys(held_to, codes)
        return Written(program, held_to, rounding, manifest)

    def _by_rows(self, rounding: Quantization | None) -> dict[str, list[Pass]]:
        """What makes of a lowered program one for few tokens and one for many; nothing where one graph serves all."""
        rounds = self.config.rounds_prefill
        if rounding is None or not (rounds or (rounding.rounds_rows and self.config.ops == "contrib")):
            return {}
        many_rows = many_rows_passes(rounding=rounds, exact=rounding.exact)
        return {"few_rows": few_rows_passes(), "many_rows": many_rows}

    def check(self, written: Written, recapture: Callable[[], Program]) -> None:
        """The gate: raise what is wrong with the artifact, or leave what was measured beside it.

        Args:
            recapture: captures the model once more, to find out which pass went wrong.
        """
        precision = written.rounding.precision if written.rounding else self.config.dtype
        with self.phases("reference"):
            reference = make_reference(
                self.source,
                self.module,
                written.program,
                precision=limits_row(precision, bool(self.pruning), self.config.cache_codes),
                rounded=written.rounded,
            )
            reference.save(self.writer.folder)
        with self.phases("gate"):
            self.writer.seal(written.manifest)
            verdict = check_apart(self.writer.folder)
            self.phases.peak["gate"] = max(self.phases.peak.get("gate", 0), verdict.peak_rss_bytes)
        if not verdict.report.passed:
            with self.phases("blame"):
                passes = [*self.pruning.optimizing, *self.pruning.passes]
                passes += written.rounding.passes if written.rounding else []
                culprit = _culprit(recapture(), passes, torch.from_numpy(reference.tokens), LIMITS[precision].model)
            raise gate_failed(verdict.report, culprit)
        write_json(self.writer.folder / "verify.json", verdict.report.as_dict())


def _culprit(program: Program, passes: Sequence[Pass], tokens: Tensor, limit: float) -> str:
    """Where what was compiled stopped being the model, in a sentence."""
    found = find_faulty_pass(program, passes, tokens, limit)
    if found is not None:
        return f"{found}."
    return "Every pass keeps the numbers without a cache: the cache, the ONNX graphs or their runtime change them."
