"""The compiler's public functions, each on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..ir.program import Program
from ..ir.stages import Stage
from ..passes.pipeline import bring_to
from ..passes.runner import PassRun, Runner
from ..runtimes.artifact.manifest import Manifest
from ..runtimes.artifact.write import ArtifactWriter, check_output
from ..runtimes.cache_folder import cache_dir
from ..runtimes.engines.selfcheck import GateReport
from ..runtimes.measure.texts import read_text
from .build import Build
from .compress.cache import CalibrationCache
from .compress.max_kl import keep_under
from .compress.pruning import choose_layers, choose_weights
from .compress.quantization import quantize
from .config import CompileConfig
from .frontend.from_source import program_of
from .frontend.identity import identity
from .frontend.sources import find_source
from .gate.verify import verify as verify_artifact
from .options import invalid
from .phases import Phases, Watch
from .targets.registry import all_options, find_target, make_config
from .trials import Trials

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def capture(
    model: str | Path | nn.Module,
    *,
    dtype: str = "fp32",
    max_seq_len: int | None = None,
    until: Stage = Stage.CANONICAL,
    dump_ir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a causal language model as a canonical program; no weight is read.

    Args:
        model: a hub id, a folder of safetensors, a GGUF file, a module in memory, or "demo".
        dtype: what the program computes in: fp32, fp16 or bf16.
        max_seq_len: the longest sequence to serve; by default the model's own limit, 2048 at most.
        until: the stage to bring it to.
        dump_ir: a folder for the program before and after each pass, as Python.
        trust_remote_code: run Python that the model brings along.
    """
    if dtype not in TORCH_DTYPES:
        what = f"dtype is {dtype!r}, which is not one of {', '.join(TORCH_DTYPES)}."
        raise UsageError("DTYPE_UNKNOWN", what, "Choose one of them.")
    source = find_source(model, trust_remote_code=trust_remote_code)
    program = program_of(source, source.build(TORCH_DTYPES[dtype]), max_seq_len)
    return bring_to(program, until, Runner(dump=Path(dump_ir) if dump_ir else None))


def compile(
    model: str | Path | nn.Module,
    output: str | Path,
    config: CompileConfig | None = None,
    *,
    dump_ir: str | Path | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    watch: Watch = lambda phase, done, total: None,
    **options: Any,
) -> Artifact:
    """Compile a causal language model into an artifact, and compare it with the model before it may exist.

    Args:
        model: a hub id, a folder of safetensors, a GGUF file, a module in memory, or "demo".
        output: the artifact's folder; an older artifact there is replaced when the new one is complete.
        config: all options in one object, in place of `options`.
        dump_ir: a folder for the program before and after each pass, as Python.
        verify: False skips the gate.
        trust_remote_code: run Python that the model brings along.
        watch: called with a phase, how many of its steps are done, and how many it has.
        options: the options of `CompileConfig`, and those of the target: `quantize="int4"`.
    """
    if config is not None and options:
        raise invalid(f"config and {next(iter(options))} are both given", "Put all options into config.")
    config = make_config(**options) if config is None else config
    target = find_target(config.target)
    target.check(config)
    reads_text = config.reads_text or target.has_constant_cache_scales(config)
    text = read_text(config.calib) if reads_text else None
    output = Path(output)
    check_output(output)
    phases = Phases(watch)
    runner = Runner(dump=Path(dump_ir) if dump_ir else None)
    dtype = TORCH_DTYPES[target.dtype(config)]
    # Decisions about weights are made in float32: they are then the same for every dtype and target.
    deciding = runner if dtype is torch.float32 else Runner()
    with ArtifactWriter(output) as writer, ExitStack() as stack:
        with phases("capture"):
            source = find_source(model, trust_remote_code=trust_remote_code)
            module = source.build(torch.float32)
            program = program_of(source, module, config.max_seq_len)
        with phases("hash"):
            known = identity(source, module)
        build = Build(source, module, program, config, target, text, writer, phases, deciding, known)
        depends_on = known, config, program.max_seq_len, text and text.sha256
        cache = stack.enter_context(CalibrationCache.of(cache_dir(), *depends_on))
        if config.drop_layers:
            with phases("layer importance"):
                build.pruning = choose_layers(source, program, config, text, cache, watch)
        with phases("passes"):
            deciding.run(program, build.pruning.optimizing)
        target.check_program(program, config)
        if config.prune is not None:
            with phases("prune"):
                build.pruning = choose_weights(build.pruning, source, program, config, text, cache, watch)
                deciding.run(program, build.pruning.passes)
        with phases("quantize"):
            quantization = quantize(source, program, config, target, text, cache, watch)
        if dtype is not torch.float32:
            build.compute_in(dtype, runner)
            target.check_program(build.program, config)
        if quantization and config.max_kl is not None:
            trials = Trials(build)
            quantization = keep_under(config.max_kl, quantization, trials.measure, trials.tokens)
        written = build.write(quantization)
        manifest = build.check(written) if verify else written.manifest
        if target.finalizes:
            with phases("finalize"):
                manifest = target.finalize(writer.folder, manifest, target.options_of(config), watch)
        manifest = writer.commit(manifest)
        cache.clear()
    report: dict[str, Mapping[str, float]] = {"seconds": phases.seconds, "peak_rss_bytes": phases.peak}
    return Artifact(output, manifest, report, tuple(build.last_runner.log))


def _show_options() -> None:
    """Let `help(compile)` and editors show every option by name."""
    shown = signature(compile)
    fixed = [p for p in shown.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    named = [Parameter(name, Parameter.KEYWORD_ONLY, default=o.default) for name, o in all_options().items()]
    compile.__signature__ = shown.replace(parameters=[*fixed, *named])  # type: ignore[attr-defined]


_show_options()


@dataclass(frozen=True)
class Artifact:
    """A compiled artifact.

    Attributes:
        path: its folder.
        manifest: its manifest.
        report: seconds and peak memory of each phase.
        passes: every pass that made it, in order, with its matches and near misses.
    """

    path: Path
    manifest: Manifest
    report: dict[str, Mapping[str, float]]
    passes: tuple[PassRun, ...] = field(default=(), repr=False)

    def verify(self) -> GateReport:
        """Run the gate again, on this machine."""
        return verify_artifact(self.path)
